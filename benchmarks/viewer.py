"""How long the viewer takes in headless Chromium: from the address to the first picture, and from a click to its maps.

    python benchmarks/viewer.py CACHE [--clicks 12] [--tokens 197 1370]

Measured on the cache, and on made ones of 24 layers x 16 heads (codec int8, random q and k of 64 components, one view)
with so many tokens. Each page is opened twice: times are of the second, when the server has everything imported; the
first is printed too. A click's time ends when the wall of all layers and heads is drawn. "frames" are the pauses
between two frames while the pointer moves over the picture and picks a query at each step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import atcache
from atcache.attention.factors import LayerFactors
from atcache.attention.geometry import FactorGeometry
from atcache.attention.tokens import TokenLayout
from atcache.codecs.registry import parse_codec
from atcache.images.source import SampleIndex
from atcache.store.layout import Status, StoreLayout
from atcache.store.writer import TaskWriter, create_cache, encode_view, finish_cache

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
NUM_LAYERS, NUM_HEADS, HEAD_DIM = 24, 16, 64


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="a cache, whose tars are where they were")
    parser.add_argument("--clicks", type=int, default=12)
    parser.add_argument("--tokens", type=int, nargs="*", default=[197, 1370], help="1 more than a square")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one JSON line a cache."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        measure(options.cache, options.browser, options.clicks)
        for num_tokens in options.tokens:
            path = make_large(options.cache, Path(folder) / f"{num_tokens}-tokens.zarr", num_tokens)
            measure(path, options.browser, options.clicks)


def make_large(like: Path, path: Path, num_tokens: int) -> Path:
    """A cache of one sample of a large teacher; what it says of views and source is another cache's."""
    side = round((num_tokens - 1) ** 0.5)
    geometry = FactorGeometry(
        layers=tuple(range(NUM_LAYERS)),
        heads=tuple(range(NUM_HEADS)),
        num_model_heads=NUM_HEADS,
        num_kv_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
        tokens=TokenLayout(num_prefix_tokens=1, grid_height=side, grid_width=side),
        scale=HEAD_DIM**-0.5,
    )
    codec = parse_codec("int8")
    generator = torch.Generator().manual_seed(0)
    shape = (1, NUM_HEADS, num_tokens, HEAD_DIM)
    layers = [
        LayerFactors(
            q_BHTD=torch.randn(shape, generator=generator),
            k_BHTD=torch.randn(shape, generator=generator),
            scale=geometry.scale,
            v_BHTD=None,
        )
        for _ in geometry.layers
    ]
    codes_BLTC = codec.coder(geometry, {}, bias_LHQK=None).encode(layers).numpy()
    record = json.loads((like / "zarr.json").read_text())["attributes"]["atcache"]
    names = tuple(record["layout"]["parameter_names"])
    _, num_layers, _, num_components = codes_BLTC.shape
    layout = StoreLayout(
        num_views=1,
        num_samples=1,
        num_layers=num_layers,
        num_tokens=num_tokens,
        num_components=num_components,
        codes_dtype=str(codes_BLTC.dtype),
        samples_per_shard=1,
        layers_per_chunk=1,
        parameter_names=names,
    )
    attributes = {name: record[name] for name in ("teacher", "views", "selection", "calibration", "created_by")}
    attributes["teacher"]["depth"] = NUM_LAYERS
    attributes["views"]["num_views"] = 1
    attributes |= {"geometry": geometry.to_json(), "codec": codec.to_json()}
    attributes["source"] = {"num_samples": 1, "fingerprint": record["source"]["fingerprint"]}
    create_cache(path, layout, attributes, _first_sample(like), {}, None)
    for task in layout.tasks():
        writer = TaskWriter(path, layout, task)
        drawn_P = atcache.open(like).reader.parameters(0, 0)
        chunks = encode_view(layout, codes_BLTC[0])
        writer.add(0, status=Status.STORED, parameters_P=drawn_P, pixel_hash=1, chunks=chunks)
        writer.commit({"row_kl_nats": 0.0})
    finish_cache(path)
    return path


def _first_sample(like: Path) -> SampleIndex:
    index = atcache.open(like).reader.samples
    columns = {
        name: getattr(index, name)[:1] for name in ("keys_S", "tar_S", "offset_S", "nbytes_S", "label_S", "problem_S")
    }
    return SampleIndex(tars=index.tars, tar_nbytes=index.tar_nbytes, **columns)


def measure(path: Path, browser: str, num_clicks: int) -> None:
    """Open the page twice, click and move the pointer in the second."""
    from playwright.sync_api import sync_playwright

    cache = atcache.open(path)
    with _served(path) as address, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=FLAGS)
        cold_ms = _first_picture(chromium, address)[1]
        page, first_ms = _first_picture(chromium, address)
        clicks_ms = [_click(page, number) for number in range(num_clicks)]
        pauses_ms = _move(page)
        result = {
            "cache": path.name,
            "layers x heads": f"{len(cache.geometry.layers)} x {len(cache.geometry.heads)}",
            "tokens": cache.geometry.tokens.num_tokens,
            "codec": cache.codec.name,
            "first picture, server just started [ms]": round(cold_ms),
            "first picture [ms]": round(first_ms),
            "click to picture, median [ms]": round(statistics.median(clicks_ms)),
            "click to picture, longest [ms]": round(max(clicks_ms)),
            "frames while the pointer moves, longest [ms]": round(max(pauses_ms)),
            "frames while the pointer moves, median [ms]": round(statistics.median(pauses_ms)),
            "fetched": page.inner_text("#fetched"),
        }
        chromium.close()
    print(json.dumps(result), flush=True)


@contextmanager
def _served(path: Path) -> Generator[str]:
    command = [sys.executable, "-m", "atcache.cli.main", "view", str(path), "--port", "0", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["address"]
        finally:
            process.terminate()


def _first_picture(chromium: Any, address: str) -> tuple[Any, float]:
    """A page, and when its first map was drawn after the address was opened."""
    page = chromium.new_page(viewport={"width": 1440, "height": 900})
    page.goto(f"{address}#pointer=values")
    entry = "performance.getEntriesByName('first-map')[0]?.startTime ?? 0"
    while not page.evaluate(entry):
        page.wait_for_timeout(10)
    first_ms = page.evaluate(entry)
    while page.evaluate("document.querySelector('[aria-busy=true]') !== null"):
        page.wait_for_timeout(10)
    return page, first_ms


def _click(page: Any, number: int) -> float:
    """From a click on a patch to the picture with its maps."""
    count = "performance.getEntriesByName('click-to-picture').length"
    before = page.evaluate(count)
    box = page.locator("#figure-a-canvas").bounding_box()
    place = np.random.default_rng(number).uniform(0.1, 0.9, 2)
    page.mouse.click(box["x"] + box["width"] * place[0], box["y"] + box["height"] * place[1])
    while page.evaluate(count) == before:
        page.wait_for_timeout(5)
    return page.evaluate("performance.getEntriesByName('click-to-picture').at(-1).duration")


def _move(page: Any) -> list[float]:
    """Times between frames while the pointer picks one query after the other."""
    page.keyboard.press("Escape")
    page.evaluate("""() => {
        globalThis.pauses = [];
        let last = performance.now();
        const note = (now) => { globalThis.pauses.push(now - last); last = now; requestAnimationFrame(note); };
        requestAnimationFrame(note);
    }""")
    box = page.locator("#figure-a-canvas").bounding_box()
    for step in range(60):
        page.mouse.move(box["x"] + box["width"] * (0.1 + step / 80), box["y"] + box["height"] * 0.5)
    page.wait_for_timeout(500)
    return page.evaluate("globalThis.pauses.slice(2)")


if __name__ == "__main__":
    main()
