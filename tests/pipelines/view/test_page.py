"""The page of `atcache view` in a real browser, served by the command: what it shows is what the cache holds."""

from __future__ import annotations

import io
import re
from urllib.parse import quote

import numpy as np
import pytest
import webdataset
from browsers import wanted_axe
from page_driver import Page, canvas_pixels
from PIL import Image
from viewing import viewing

import atcache

TOLERANCE = 1e-4
SAMPLE = "digits-0001.tar/digit-00020"


@pytest.fixture(scope="module")
def cache_path(tiny_cache):
    return tiny_cache(views=2, policy="crop-flip")


@pytest.fixture(scope="module")
def served(cache_path):
    with viewing(cache_path) as served:
        yield served.address


@pytest.fixture(scope="module")
def served_pair(cache_path, tiny_cache):
    with viewing(cache_path, tiny_cache(views=2, policy="crop-flip", codec="logmap:bits=4")) as served:
        yield served.address


@pytest.fixture
def open_page(browser):
    """A function: address -> a page whose first picture is there. No page may have an error that nobody sees."""
    opened = []

    def open_page(address, *, waits_for="first-picture", **options):
        page = Page(browser, address, **options)
        opened.append(page)
        if waits_for:
            page.wait_until(f"performance.getEntriesByName('{waits_for}').length > 0")
        return page

    yield open_page
    for page in opened:
        assert page.errors == []
        page.close()


def maps_of(path, sample=SAMPLE, view=0):
    return atcache.open(path).view(sample=sample, view=view).maps_LHQK


def test_clicked_patches_show_the_cache_s_numbers(open_page, served, cache_path):
    maps_LHQK = maps_of(cache_path)
    page = open_page(f"{served}#sample={SAMPLE}&layer=1&head=1")
    assert page.text("#sample-name").startswith(SAMPLE)
    page.click_patch("#figure-a-canvas", row=2, column=1)  # token 1 + 2 * 4 + 1
    page.wait_until("document.querySelector('#asked').textContent === 'Query: row 2, column 1'")
    for row, column in ((0, 0), (2, 1), (3, 3)):
        page.point_at("#figure-a-canvas", row=row, column=column)
        assert page.value() == pytest.approx(maps_LHQK[1, 1, 10, 1 + row * 4 + column], abs=TOLERANCE)
    # A second query: the mean of both rows.
    page.click_patch("#figure-a-canvas", row=0, column=3, modifiers=["Shift"])
    page.wait_until("document.querySelector('#asked').textContent.startsWith('Mean of 2 queries')")
    page.point_at("#figure-a-canvas", row=3, column=2)
    assert page.value() == pytest.approx((maps_LHQK[1, 1, 10, 15] + maps_LHQK[1, 1, 4, 15]) / 2, abs=TOLERANCE)


def test_the_pointer_picks_queries_until_one_is_clicked(open_page, served, cache_path):
    maps_LHQK = maps_of(cache_path)
    page = open_page(f"{served}#sample={SAMPLE}&layer=0&head=0")
    for row, column in ((1, 1), (3, 0)):
        token = 1 + row * 4 + column
        page.point_at("#figure-a-canvas", row=row, column=column)
        page.wait_until(f"document.querySelector('#asked').textContent === 'Query: row {row}, column {column}'")
        page.wait_for_value(maps_LHQK[0, 0, token, token], TOLERANCE)
    page.click("#save")  # away from the picture
    page.move(5, 5)
    page.wait_until("document.querySelector('#asked').textContent === 'Query: CLS'")


def test_heads_are_combined(open_page, served, cache_path):
    maps_LHQK = maps_of(cache_path).astype(float)
    residual = [(attn_HQK.mean(axis=0) + np.eye(17)) / 2 for attn_HQK in maps_LHQK]
    expected = {
        "mean": maps_LHQK[1, :, 6].mean(axis=0),
        "max": maps_LHQK[1, :, 6].max(axis=0),
        "rollout": (residual[1] @ residual[0])[6],
    }
    for mode, row_K in expected.items():
        page = open_page(f"{served}#sample={SAMPLE}&layer=1&query=6&mode={mode}")
        page.point_at("#figure-a-canvas", row=1, column=2)
        page.wait_for_value(row_K[7], TOLERANCE)


def test_a_link_shows_the_same_thing(open_page, served):
    page = open_page(f"{served}#sample={SAMPLE}&view=1")
    page.click_patch("#figure-a-canvas", row=1, column=3)
    page.choose("#clip", "0.95")
    page.choose("#scale", "number")  # which hides the choice before
    page.choose("#colours", "magma")
    page.slide("#contour", 0.6)
    page.press("ArrowUp")
    page.press("ArrowRight")
    page.move(5, 5)  # the pointer's own mark is in no address
    page.settle()
    address, shown = page.address, page.shown()
    assert f"sample={SAMPLE}&" in address
    assert "query=8&" in address
    assert "contour=0.6" in address
    again = open_page(address)
    again.settle()
    assert again.address == address
    assert again.shown() == shown
    assert np.array_equal(canvas_pixels(again, "#figure-a-canvas"), canvas_pixels(page, "#figure-a-canvas"))


def test_keys_move_through_layers_heads_samples_and_views(open_page, served):
    page = open_page(f"{served}#layer=0&head=0&sample=3")
    moves = {"ArrowDown": "layer=1", "ArrowRight": "head=1", "v": "view=1", "n": "digit-00004", "m": "mode=mean"}
    for key, expected in moves.items():
        page.press(key)
        page.wait_until(f"location.hash.includes('{expected}')")
    page.press("p")
    page.wait_until("location.hash.includes('digit-00003')")
    page.press("s")
    page.wait_until("location.hash.includes('scale=map')")
    page.press("?")
    page.wait_until("document.querySelector('#help').open")
    page.press("Escape")
    page.wait_until("!document.querySelector('#help').open")
    page.press("c")
    page.wait_until("location.hash.includes('query=0')")
    # In the picture, arrows move the query by a patch.
    page.focus("#figure-a .picture")
    page.press("ArrowRight")
    page.press("ArrowDown")
    page.wait_until("location.hash.includes('query=6')")


def test_keys_that_come_faster_than_maps_all_count(open_page, served):
    page = open_page(f"{served}#layer=0&head=0&sample=3&query=0")
    page.page.evaluate("""() => {
        const picture = document.querySelector("#figure-a .picture");
        for (const key of ["ArrowRight", "ArrowDown", "ArrowDown", "ArrowRight", "ArrowLeft"])
            picture.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
    }""")
    page.wait_until("location.hash.includes('query=10')")


def test_a_key_typed_just_after_the_help_was_closed_counts(open_page, served):
    page = open_page(f"{served}#layer=0&head=0&sample=3")
    page.press("?")
    page.wait_until("document.querySelector('#help').open")
    # The browser gives the focus back a moment after it closed the dialog: until then keys come from the button in it.
    page.page.evaluate("""() => {
        const button = document.querySelector("#help button");
        document.querySelector("#help").close();
        button.dispatchEvent(new KeyboardEvent("keydown", {key: "c", bubbles: true}));
    }""")
    page.wait_until("location.hash.includes('query=0')")


def test_two_caches_their_difference_and_its_divergence(open_page, served_pair, cache_path, tiny_cache):
    a_LHQK = maps_of(cache_path)
    b_LHQK = maps_of(tiny_cache(views=2, policy="crop-flip", codec="logmap:bits=4"))
    page = open_page(f"{served_pair}#sample={SAMPLE}&layer=1&head=0&query=5&wall=difference")
    page.wait_until("document.querySelector('#comparison').dataset.kl !== undefined")
    a_K, b_K = a_LHQK[1, 0, 5].astype(float), b_LHQK[1, 0, 5].astype(float)
    kl = float((a_K * np.log(a_K / np.maximum(b_K, 1e-12))).sum())
    assert kl > 1e-4
    assert page.number("document.querySelector('#comparison').dataset.kl") == pytest.approx(kl, abs=TOLERANCE)
    page.point_at("#figure-difference-canvas", row=0, column=2)
    values = [float(word) for word in re.findall(r"(?:A|B) (-?[\d.e-]+)(?: ·|$)", page.text("#readout"))]
    assert values == pytest.approx([a_K[3], b_K[3], a_K[3] - b_K[3]], abs=TOLERANCE)


def test_search_and_sorting(open_page, served, cache_path):
    page = open_page(f"{served}#search=digit-0003")
    page.wait_until("document.querySelector('#samples-count').textContent === '10 of 48 samples'")
    page.choose("#sort", "entropy")
    page.wait_until("document.querySelector('#samples-count').textContent === '10 of 48 samples'")
    page.wait_until("document.querySelectorAll('#samples .note')[9]?.textContent.endsWith('bits')")
    shown = page.evaluate("[...document.querySelectorAll('#samples .name')].map((name) => name.textContent)")
    cache = atcache.open(cache_path)
    entropy = {
        f"digit-{row:05d}": float(atcache.stats.attention_entropy(cache.view(row).maps_LHQK[1, 0]).mean())
        for row in range(30, 40)
    }
    assert shown == sorted(entropy, key=lambda name: -entropy[name])
    page.page.fill("#search", "nobody")
    page.wait_until("document.querySelector('#samples-count').textContent === 'No sample has this key and class.'")
    assert page.evaluate("document.querySelectorAll('#samples .name').length") == 0


def test_sorting_again_lists_only_the_new_order(open_page, served, cache_path):
    """Of more samples than are listed at once. Their statistics are known then: no sort waits for the tiles."""
    cache = atcache.open(cache_path)
    entropy_LHS = np.array(
        [atcache.stats.attention_entropy(cache.view(row).maps_LHQK).mean(axis=-1) for row in range(48)]
    ).transpose(1, 2, 0)
    page = open_page(f"{served}#layer=1&head=0&sort=entropy")

    def check(entropy_S, sign):
        page.wait_until("document.querySelector('#samples-count').textContent === '48 of 48 samples'")
        page.wait_until("document.querySelectorAll('#samples .name').length >= 32")
        page.settle()
        shown = page.evaluate("[...document.querySelectorAll('#samples .name')].map((name) => name.textContent)")
        rows = [int(name.removeprefix("digit-")) for name in shown]
        assert len(set(rows)) == len(rows)
        # Samples whose numbers are the same but for rounding may stand in either order.
        assert entropy_S[rows] == pytest.approx(sign * np.sort(sign * entropy_S)[: len(rows)], abs=1e-5)

    check(entropy_LHS[1, 0], sign=-1)
    page.press("ArrowRight")
    page.wait_until("location.hash.includes('head=1')")
    check(entropy_LHS[1, 1], sign=-1)
    page.click("#direction")
    page.wait_until("document.querySelector('#direction').dataset.descending === 'false'")
    check(entropy_LHS[1, 1], sign=1)


def test_a_head_that_looks_left(open_page, tiny_cache, tmp_path):
    import shutil

    import zarr

    path = shutil.copytree(tiny_cache(views=1, policy="eval"), tmp_path / "left.zarr")
    codes = zarr.open_group(path, mode="r+")["attention/codes"]
    q_TD, k_TD = np.zeros((17, 16), np.float16), np.zeros((17, 16), np.float16)
    row, column = np.divmod(np.arange(16), 4)

    def place(row, column):
        """Two angles: of all patches, only the same one has the largest dot product."""
        angles = np.array([row, column]) * np.pi / 2
        return np.concatenate([np.cos(angles), np.sin(angles)]).T

    k_TD[1:, :4] = place(row, column)
    q_TD[1:, :4] = place(row, column - 1) * 64
    vectors_TND = np.stack([q_TD, q_TD, k_TD, k_TD], axis=1)
    shard = codes[:, :20]
    shard[:] = vectors_TND.reshape(17, -1).view(np.int16)
    codes[:, :20] = shard
    with viewing(path) as served:
        page = open_page(f"{served.address}#sample=2")
        for row, column in ((0, 1), (2, 3), (3, 2)):
            page.click_patch("#figure-a-canvas", row=row, column=column)
            page.wait_until(f"document.querySelector('#facts').textContent.includes('row {row}, column {column - 1}:')")


# Every point of these images says by its colour where it is.
WIDTH, HEIGHT = 240, 160
WIDE_TEACHER = "vit_tiny_patch16_224:img_size=(64,96),embed_dim=32,depth=2,num_heads=2,num_classes=10"


@pytest.fixture(scope="module")
def coloured_tar(tmp_path_factory):
    path = tmp_path_factory.mktemp("coloured") / "places.tar"
    across, down = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    image = Image.fromarray(np.stack([across, down, np.full_like(down, 128)], axis=-1).astype(np.uint8))
    encoded = io.BytesIO()
    image.save(encoded, format="PNG")
    with path.open("wb") as file, webdataset.TarWriter(file) as writer:
        for sample in range(12):
            writer.write({"__key__": f"place-{sample}", "png": encoded.getvalue(), "cls": "0"})
    return path


@pytest.fixture(scope="module")
def wide_weights(tmp_path_factory):
    import torch
    from safetensors.torch import save_file

    from atcache.teachers.load import create_student
    from atcache.teachers.names import parse_model_name

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "wide.safetensors"
    save_file(create_student(parse_model_name(WIDE_TEACHER), num_classes=10).state_dict(), path)
    return path


def build_places(tar, out, **fields):
    from atcache.pipelines.build.config import BuildConfig
    from atcache.pipelines.build.run import build

    common = {"teacher": WIDE_TEACHER, "codec": "int8", "workers": 0, "device": "cpu", "precision": "fp32"}
    build(BuildConfig(**common, data=str(tar), out=out, **fields))
    return atcache.open(out)


def parameters(cache, row):
    reader = cache.reader
    return dict(zip(reader.layout.parameter_names, reader.parameters(0, row).tolist(), strict=True))


@pytest.mark.parametrize("policy", ["crop-flip", "randaug"])
def test_crop_flip_and_turns_put_the_map_where_it_belongs(open_page, coloured_tar, wide_weights, tmp_path, policy):
    """The view's colours say which place of the clean image each patch shows; pointing there must find the patch."""
    cache = build_places(coloured_tar, tmp_path / "places.zarr", weights=wide_weights, policy=policy, views=1)
    # Operations that change colours would change what the colours say.
    moves = {-1, 3, 11, 12, 13, 14}
    drawn = {row: parameters(cache, row) for row in range(12)}
    rows = [row for row, own in drawn.items() if {own["operation_1"], own["operation_2"]} <= moves]
    assert policy == "randaug" or {drawn[row]["flip"] for row in rows} == {0.0, 1.0}
    assert rows, "this seed draws no view without colour operations"
    num_checked = 0
    with viewing(cache.path) as served:
        for row in rows[:4]:
            page = open_page(f"{served.address}#sample={row}&query=0")
            view = cache.image(row).astype(int)
            for patch_row, patch_column in ((0, 1), (1, 4), (3, 0), (2, 2)):
                across, down, blue = view[patch_row * 16 + 8, patch_column * 16 + 8]
                if abs(blue - 128) > 2:  # pulled in from outside of the image
                    continue
                page.point_in_image("#figure-clean-canvas", (across + 0.5) / WIDTH, (down + 0.5) / HEIGHT)
                assert page.text("#readout").startswith(f"row {patch_row}, column {patch_column}:")
                num_checked += 1
    assert num_checked >= 4


def test_a_pasted_box_has_no_map_on_the_clean_image(open_page, coloured_tar, wide_weights, tmp_path):
    cache = build_places(
        coloured_tar, tmp_path / "mixed.zarr", weights=wide_weights, policy="crop-flip", cutmix=1.0, views=1
    )
    drawn = {row: parameters(cache, row) for row in range(12)}
    row, own = max(drawn.items(), key=lambda item: item[1]["mix_height"] * item[1]["mix_width"])
    assert own["mix_height"] > 16
    assert own["mix_width"] > 16

    def place(x, y):
        """Of a point of the view in the clean image, as shares; these views are cropped, resized and flipped only."""
        x = 96 - x if own["flip"] else x
        across = own["crop_left"] + x * own["crop_width"] / own["resize_width"]
        return across / WIDTH, (own["crop_top"] + y * own["crop_height"] / own["resize_height"]) / HEIGHT

    with viewing(cache.path) as served:
        page = open_page(f"{served.address}#sample={row}&query=0&opacity=1&scale=1000")
        assert "pasted from another sample" in page.text("#figure-a figcaption")
        pixels = canvas_pixels(page, "#figure-clean-canvas")[..., :3].astype(int)
    height, width = pixels.shape[:2]
    own_patch = next(
        (x, y)
        for x, y in ((8.5, 8.5), (88.5, 8.5), (8.5, 56.5), (88.5, 56.5))
        if not own["mix_left"] - 4 <= x <= own["mix_left"] + own["mix_width"] + 4
        or not own["mix_top"] - 4 <= y <= own["mix_top"] + own["mix_height"] + 4
    )
    across, down = place(own["mix_left"] + own["mix_width"] / 2, own["mix_top"] + own["mix_height"] / 2)
    pasted = pixels[int(down * height), int(across * width)]
    across, down = place(*own_patch)
    covered = pixels[int(down * height), int(across * width)]
    assert np.ptp(pasted) <= 2, "the clean image itself, in grey"
    assert covered.tolist() == [0x44, 0x01, 0x54], "the first colour of the scale"


def test_files_of_the_pictures(open_page, served, cache_path):
    import xml.etree.ElementTree as xml

    page = open_page(f"{served}#sample={SAMPLE}&layer=1&head=1&query=3")
    name, png = page.save("png")
    assert name == "digits-0001.tar_digit-00020-view0-layer1-head1.png"
    image = Image.open(io.BytesIO(png))
    image.load()
    assert min(image.size) > 600
    _, svg = page.save("svg")
    texts = [element.text for element in xml.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert f"{SAMPLE}, view 0" in texts
    assert "layer 1, head 1 · query: row 0, column 2" in texts
    images = list(xml.fromstring(svg).iter("{http://www.w3.org/2000/svg}image"))
    assert len(images) == 3
    assert all(image.get("href").startswith("data:image/png;base64,") for image in images)
    _, pdf = page.save("pdf")
    check_pdf(pdf)
    scale = float(texts[-2])  # the colour bar's last number
    assert scale == pytest.approx(np.quantile(maps_of(cache_path)[:, :, 3, 1:], 0.99), rel=0.2)


def check_pdf(pdf):
    """Its table says where each object begins, and its streams have the length they state."""
    import zlib

    assert pdf.startswith(b"%PDF-1.")
    start = int(re.search(rb"startxref\n(\d+)\n%%EOF\n$", pdf).group(1))
    count, entries = re.match(rb"xref\n0 (\d+)\n((?:.{20})+)trailer", pdf[start:], re.DOTALL).groups()
    offsets = [int(entries[place : place + 10]) for place in range(20, 20 * int(count), 20)]
    assert len(offsets) == int(count) - 1
    for number, offset in enumerate(offsets, 1):
        assert pdf[offset:].startswith(b"%d 0 obj\n" % number)
    streams = list(re.finditer(rb"<<([^\n]*)/Length (\d+) >>\nstream\n", pdf))
    contents = [zlib.decompress(pdf[found.end() : found.end() + int(found.group(2))]) for found in streams]
    assert b"Tj ET" in contents[0]
    for found, content in zip(streams[1:], contents[1:], strict=True):
        width, height = (
            int(re.search(rb"/%s (\d+)" % side, found.group(1)).group(1)) for side in (b"Width", b"Height")
        )
        assert len(content) == width * height * 3


@pytest.mark.parametrize(
    ("what", "width", "scheme"),
    [
        *((what, width, scheme) for what in ("one", "two") for width in (1440, 390) for scheme in ("light", "dark")),
        *((what, width, scheme) for what in ("error", "help") for width, scheme in ((1440, "light"), (390, "dark"))),
    ],
)
def test_everybody_can_use_it(open_page, served, served_pair, width, scheme, what):
    """axe finds nothing, and nothing is wider than the screen."""
    axe = wanted_axe()
    address = f"{served_pair if what == 'two' else served}#sample={'nobody/x' if what == 'error' else 3}&mode=mean"
    waits_for = None if what == "error" else "first-picture"
    page = open_page(address, waits_for=waits_for, viewport={"width": width, "height": 844}, color_scheme=scheme)
    if what == "error":
        page.wait_until("!document.querySelector('#error').hidden")
    if what == "help":
        page.press("?")
    page.settle()
    assert page.number("document.documentElement.scrollWidth") <= width
    found = axe.Axe().run(page.page)
    assert found.violations_count == 0, found.generate_report()


def test_errors_are_sentences_in_a_box(open_page, served, browser, tmp_path):
    wrong = {
        "#sample=nobody.tar/x": ("no-such-sample", "nobody.tar/x"),
        "#sample=48": ("no-such-sample", "rows are 0 to 47"),
        f"#cache={quote(served + 'assets', safe='')}": ("not-a-cache", "assets"),
    }
    for address, (kind, words) in wrong.items():
        page = open_page(f"{served}{address}", waits_for=None)
        page.wait_until("!document.querySelector('#error').hidden")
        assert page.evaluate("document.querySelector('#error').dataset.kind") == kind
        assert words in page.text("#error")
        assert page.text("#error").endswith(".")
        assert not page.is_visible("#figure-a-canvas")


def test_after_an_error_another_sample_can_be_shown(open_page, served):
    page = open_page(f"{served}#sample=nobody.tar/x", waits_for=None)
    page.wait_until("document.querySelectorAll('#samples [role=option]').length > 3")
    page.click("#sample-2")
    page.wait_until("performance.getEntriesByName('first-picture').length > 0")
    assert not page.is_visible("#error")
    assert page.is_visible("#figure-a-canvas")


def test_the_first_picture_needs_no_model_and_few_bytes(open_page, served, cache_path):
    page = open_page(served)
    assert re.match(r"\d+ kB in \d+ requests · first picture after \d", page.text("#fetched"))
    assert page.servers() == {served.split("/")[2]}


def test_a_rollout_is_of_no_layer(open_page, served):
    import xml.etree.ElementTree as xml

    page = open_page(f"{served}#sample={SAMPLE}&layer=0&query=3&mode=rollout")
    page.wait_until("document.querySelector('#facts').textContent.startsWith('entropy')")
    assert "; the rollout is of all of them." in page.page.get_attribute("#wall-canvas", "aria-label")
    name, svg = page.save("svg")
    assert name == "digits-0001.tar_digit-00020-view0-rollout.svg"
    texts = [element.text for element in xml.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "rollout through all layers · query: row 0, column 2" in texts
    # The wall's maps have numbers of their own, which the picture's colour bar does not say.
    assert any(re.match(r"Layers down, heads across, colours from 0 to 0\.\d", text) for text in texts)


def test_maps_of_the_sample_before_never_lie_over_the_next_one(open_page, served, cache_path):
    page = open_page(f"{served}#sample={SAMPLE}&layer=1&head=1&query=3")
    held = []
    page.page.route("**/attention/codes/**", lambda route: held.append(route))
    page.press("n")
    page.wait_until("document.querySelector('#sample-name').textContent.includes('digit-00021')")
    page.press("c")
    page.page.wait_for_timeout(500)
    assert held, "the next sample's maps are asked for"
    assert page.text("#facts") == ""
    assert not page.is_visible("#wall-canvas")
    for route in held:
        route.continue_()
    page.page.unroute("**/attention/codes/**")
    page.wait_until("document.querySelector('#facts').textContent.startsWith('entropy')")
    page.point_at("#figure-a-canvas", row=1, column=1)
    page.wait_for_value(maps_of(cache_path, "digits-0001.tar/digit-00021")[1, 1, 0, 6], TOLERANCE)


def test_an_address_that_names_what_is_not_stored_is_told_so(open_page, served):
    page = open_page(f"{served}#sample={SAMPLE}&layer=7&head=9&query=3,99")
    page.wait_until("document.querySelector('#said').textContent.includes('layer 7, head 9, query 99')")
    assert "query=3" in page.address


def test_after_a_view_that_cannot_be_read_the_next_view_is_of_the_same_sample(open_page, served):
    page = open_page(f"{served}#sample={SAMPLE}")
    page.page.route("**/attention/codes/c/0/**", lambda route: route.fulfill(status=500))
    page.press("n")
    page.wait_until("!document.querySelector('#error').hidden")
    page.press("v")
    page.wait_until("document.querySelector('#facts').textContent.startsWith('entropy')")
    page.wait_until("document.querySelector('#error').hidden")
    assert "digit-00021&view=1" in page.address
    page.errors.clear()  # of the route


def test_a_head_that_only_one_cache_has_has_no_difference(open_page, cache_path, tiny_cache):
    with viewing(cache_path, tiny_cache(views=2, policy="crop-flip", heads="0")) as served:
        page = open_page(f"{served.address}#sample={SAMPLE}&layer=1&head=1&query=3&wall=difference")
        page.wait_until("document.querySelector('#wall-note').textContent.includes('head 1 · not stored in')")
        assert not page.is_visible("#comparison")
