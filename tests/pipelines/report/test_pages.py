"""The pages in a real browser: they ask nobody for anything, nothing runs in them, and everybody can use them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browsers import wanted_axe
from PIL import Image
from reported_runs import HOSTILE

from atcache.pipelines.demo.page import write_page
from atcache.pipelines.demo.summary import DemoSummary, ModeResult


@pytest.fixture(scope="module")
def demo_page(tmp_path_factory) -> Path:
    """The page of a demo's results."""
    out = tmp_path_factory.mktemp("demo")
    Image.new("RGB", (1300, 900), "navy").save(out / "maps.png")
    for mode in ("copy", "scratch"):
        (out / "runs" / f"{mode}-0").mkdir(parents=True)
        (out / "runs" / f"{mode}-0" / "report.html").write_text("<!doctype html><title>a run</title>")
    modes = {"copy": 79.0, "distill": 79.6, "scratch": 62.2, "finetune": 90.6, "ensemble": 89.2}
    write_page(
        DemoSummary(
            out=str(out),
            modes={
                mode: ModeResult(top1=top1, top1_per_seed=(top1,), gap_closed=0.5, seconds=30.0)
                for mode, top1 in modes.items()
            },
            cache_nbytes_per_view=454.0,
            map_nbytes_per_view=8192,
            num_views=1797,
            seconds=150.0,
            commands=("atcache build --out a", "atcache train --out b"),
            page=str(out / "demo.html"),
        )
    )
    return out / "demo.html"


@pytest.fixture(scope="module")
def pages(run_of, demo_page) -> dict[str, Path]:
    return {"distill": run_of("distill") / "report.html", "copy": run_of("copy") / "report.html", "demo": demo_page}


@pytest.mark.parametrize(
    ("what", "width", "scheme"),
    [(what, width, scheme) for what in ("distill", "demo") for width, scheme in ((1200, "light"), (390, "dark"))]
    + [("copy", 390, "light"), ("distill", 1200, "dark")],
)
def test_everybody_can_use_a_page_without_a_network(browser, pages, what, width, scheme):
    axe = wanted_axe()
    context = browser.new_context(offline=True, color_scheme=scheme, viewport={"width": width, "height": 844})
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    address = pages[what].as_uri()
    page.goto(address)
    for summary in page.query_selector_all("summary"):
        summary.click()
    assert said == []
    assert [url for url in asked if url != address and not url.startswith("data:")] == []
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)" if scheme == "light" else "rgb(17, 21, 27)"
    )
    found = axe.Axe().run(page)
    context.close()
    assert found.violations_count == 0, found.generate_report()


def test_a_class_named_like_a_script_runs_none(browser, pages):
    page = browser.new_page()
    page.goto(pages["distill"].as_uri())
    assert page.title() == "Run distill"
    assert HOSTILE in page.inner_text("main")
    assert page.evaluate("document.scripts.length") == 0
    page.close()


def test_charts_are_drawn_in_the_colours_of_the_page(browser, pages):
    colours = set()
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(pages["distill"].as_uri())
        assert page.evaluate("document.querySelectorAll('svg[role=img][aria-label]').length") == 4
        colours.add(page.evaluate("getComputedStyle(document.querySelector('svg text')).fill"))
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
        assert len(ids) == len(set(ids))
        page.close()
    assert colours == {"rgb(27, 34, 44)", "rgb(230, 234, 240)"}


def test_the_demos_page_leads_to_the_reports_and_to_the_next_commands(demo_page):
    text = demo_page.read_text()
    links = re.findall(r'href="([^"#]+)"', text.partition("<main>")[2])
    links = [link for link in links if not link.startswith("data:")]
    assert links == ["runs/copy-0/report.html", "runs/scratch-0/report.html"]
    assert all((demo_page.parent / link).exists() for link in links)
    assert "atcache pack --data photos/train --out tars/train" in text
