"""What a build's leading process does now and then: it shows how far all are, warns as soon as views turn out worse
than expected, and joins commit records where there are many.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from atcache.files.location import Location
from atcache.files.sizes import size_text
from atcache.store.layout import StoreLayout, Task

from ..fidelity import Expectation, Watch
from ..running.progress import Progress
from .board import Counts
from .shared_folder import RecordJoiner


@contextmanager
def telling(
    out: Location, layout: StoreLayout, expectation: Expectation, tasks: Sequence[Task], total: Callable[[], Counts]
) -> Generator[Callable[[], None]]:
    """A function to call now and then, which shows what all processes have done.

    Args:
        out: the cache.
        layout: of the cache.
        expectation: what its views should be like.
        tasks: those of this build.
        total: what was done so far.
    """
    joiner = RecordJoiner(out, layout)
    watch, start_s = Watch(expectation), time.monotonic()
    all_views = layout.num_views * layout.num_real_samples
    done_views = all_views - sum(task.num_samples for task in tasks)
    with Progress("build", total=all_views, unit="views", done=done_views) as progress:

        def tell() -> None:
            now = total()
            speed = size_text(now.nbytes / (time.monotonic() - start_s))
            news = done_views + now.num_views - progress.done
            progress.advance(news, f"{size_text(now.nbytes)}, {speed}/s")
            if (warning := watch.see(now.sum_nats, now.num_checked)) is not None:
                progress.say(warning)
            joiner.look()

        yield tell
