"""One page of the viewer in a browser, as a user has it: clicks, keys, and what can be read.

Scripts that wait are asked again and again by `evaluate`: playwright's own waiting needs `eval` in the page, which the
page's policy may forbid.
"""

from __future__ import annotations

import base64
import io
import re
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from atcache.errors import AtcacheError

# The server imports torch to replay the first view, which takes a while on a busy machine.
_PATIENCE_S = 120


class Page:
    """A page of its own in the browser, until it is closed."""

    def __init__(self, browser, address, **options) -> None:
        self._context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        self.page = self._context.new_page()
        self.errors: list[str] = []
        self._requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: message.type == "error" and self._note(message))
        self.page.on("request", lambda request: self._requests.append(request.url))
        self.page.goto(address)

    def _note(self, message) -> None:
        # The browser's own line on an answer of 404: what the page makes of it is tested.
        if "Failed to load resource" not in message.text:
            self.errors.append(message.text)

    def close(self) -> None:
        self._context.close()

    def evaluate(self, script):
        return self.page.evaluate(script)

    def wait_until(self, script, timeout_s=_PATIENCE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.page.evaluate(script):
            if time.monotonic() > deadline:
                shown = self.page.inner_text("body")
                raise AtcacheError(f"never true: {script}\n{self.errors}\n{self.address}\n{shown}")
            self.page.wait_for_timeout(20)

    def settle(self) -> None:
        """Until nothing is busy and two frames are drawn."""
        self.wait_until("!document.querySelector('[aria-busy=true]')")
        self.page.wait_for_timeout(300)

    @property
    def address(self) -> str:
        return self.page.evaluate("location.href")

    def text(self, selector) -> str:
        return self.page.evaluate(f"document.querySelector({selector!r}).textContent")

    def number(self, script) -> float:
        return float(self.page.evaluate(script))

    def is_visible(self, selector) -> bool:
        return self.page.is_visible(selector)

    def value(self) -> float:
        """The number of the patch under the pointer."""
        return float(re.search(r": (-?[\d.e-]+)$", self.text("#readout")).group(1))

    def wait_for_value(self, expected, tolerance, timeout_s=_PATIENCE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while abs(self.value() - expected) > tolerance:
            assert time.monotonic() < deadline, f"{self.text('#readout')}, expected {expected}"
            self.page.wait_for_timeout(20)

    def shown(self) -> list[str]:
        """What the page says of the picture."""
        names = ("#sample-name", "#asked", "#facts", "#bar", "#wall-note")
        return [self.text(name) for name in names]

    def _grid(self) -> tuple[int, int]:
        numbers = re.search(r"(\d+) \W (\d+) patches", self.text("header"))
        return int(numbers.group(1)), int(numbers.group(2))

    def _place(self, row, column) -> tuple[float, float]:
        rows, columns = self._grid()
        return (column + 0.5) / columns, (row + 0.5) / rows

    def point_in_image(self, canvas, across, down) -> None:
        """Move the pointer to a place given as shares of the image's sides."""
        self.page.locator(canvas).scroll_into_view_if_needed()
        box = self.page.locator(canvas).bounding_box()
        self.page.mouse.move(box["x"] + box["width"] * across, box["y"] + box["height"] * down)

    def point_at(self, canvas, *, row, column) -> None:
        self.point_in_image(canvas, *self._place(row, column))

    def click_patch(self, canvas, *, row, column, modifiers=()) -> None:
        across, down = self._place(row, column)
        self.page.locator(canvas).scroll_into_view_if_needed()
        box = self.page.locator(canvas).bounding_box()
        place = {"x": box["width"] * across, "y": box["height"] * down}
        self.page.locator(canvas).click(position=place, modifiers=list(modifiers))

    def move(self, x, y) -> None:
        self.page.mouse.move(x, y)

    def click(self, selector) -> None:
        self.page.click(selector)

    def press(self, key) -> None:
        self.page.keyboard.press(key)

    def focus(self, selector) -> None:
        self.page.focus(selector)

    def choose(self, selector, value) -> None:
        self.page.select_option(selector, value)
        self.page.evaluate("document.activeElement.blur()")

    def slide(self, selector, value) -> None:
        self.page.fill(selector, str(value))
        self.page.evaluate("document.activeElement.blur()")

    def save(self, kind) -> tuple[str, bytes]:
        """Name and bytes of the file that the page hands over."""
        with self.page.expect_download() as waiting:
            self.page.select_option("#save", kind)
        download = waiting.value
        return download.suggested_filename, Path(download.path()).read_bytes()

    def servers(self) -> set[str]:
        """Hosts that were asked for anything."""
        parts = [urlsplit(url) for url in self._requests]
        return {part.netloc for part in parts if part.scheme in ("http", "https", "ws", "wss")}


def canvas_pixels(page, selector) -> np.ndarray:
    """uint8 (height, width, 4)."""
    url = page.evaluate(f"document.querySelector({selector!r}).toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGBA"))
