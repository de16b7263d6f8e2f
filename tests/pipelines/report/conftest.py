"""The browser, and the runs to report on."""

from __future__ import annotations

from browsers import browser as browser
from reported_runs import named_caches as named_caches, run_of as run_of
