"""Work done ahead of who asks for it, but not far."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor


def ahead(pool: Executor, function: Callable, items: Iterable, limit: int) -> Iterator:
    """As ``pool.map``, but at most ``limit`` items ahead: however many come, few results are held."""
    waiting: list = []
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > limit:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()
