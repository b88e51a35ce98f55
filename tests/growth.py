"How the time of a piece of work grows with its size."
import gc
import time
from collections.abc import Callable


def seconds(work: Callable[[], object]) -> float:
    "Processor seconds of `work`; the collector, whose time grows with all that the process holds, is off meanwhile."
    gc.disable()
    try:
        start = time.process_time()
        work()
        return time.process_time() - start
    finally: gc.enable()


def is_linear(work: Callable[[int], object], size: int) -> bool:
    "Whether work of four times the size takes less than 12 times as long, where a square would take 16; the best of three tries, as the machine has other work."
    work(1000)
    return any(seconds(lambda: work(4 * size)) < 12 * max(seconds(lambda: work(size)), 0.1) for _ in range(3))
