"""The browser of the viewer's tests."""

from __future__ import annotations

from browsers import browser as browser
