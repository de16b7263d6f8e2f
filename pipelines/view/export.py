"""The page with chosen samples: a folder of files for any web server, or one HTML file that needs none."""

from __future__ import annotations

import base64
import json
import re
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from atcache.cache.cache import Cache
from atcache.errors import AtcacheError, CacheMissError, ConfigError
from atcache.fields import JsonFields
from atcache.files.durable import check_can_write, disk_errors_explained, make_folder, partial_path

from .chosen import choose_rows, rows_of_keys, why_no_views, write_chosen
from .config import DEFAULT_SAMPLES, ViewConfig
from .images import Pictures
from .site import describe_site, name_caches, read_page

_SCRIPT = re.compile(r'<script type="module"[^>]* src="\./(assets/[^"]+)"></script>')
_STYLE = re.compile(r'<link rel="stylesheet"[^>]* href="\./(assets/[^"]+)">')


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSummary(JsonFields):
    """What an export has written."""

    out: str
    caches: tuple[str, ...]
    num_samples: tuple[int, ...]
    """Of each cache, with those that chosen views are mixed with."""
    has_images: bool
    """Whether the clean images are in it."""
    has_views: bool
    """Whether the views are in it, as the teacher saw them."""
    nbytes: int
    seconds: float


def export(config: ViewConfig, tell: Callable[[str], None]) -> ExportSummary:
    """Write page and chosen samples.

    Args:
        config: the options; `export` is given.
        tell: gets what the user should know: the size before anything is written, and what cannot be had.

    Raises:
        ConfigError: the place exists, a sample is none, or it would be larger than `max_mib`.
        AtcacheError: a cache cannot be read.
    """
    start_s = time.monotonic()
    out = config.export
    assert out is not None, "the command asks for it"
    page = read_page()
    is_one_file = out.suffix in (".html", ".htm")
    if out.exists():
        raise ConfigError(f"export={str(out)!r} exists already. Remove it, or give another name.")
    check_can_write(out)
    parts = _choose(config, tell)
    nbytes = (sum(map(len, page.values())) + sum(part.nbytes for part in parts)) * (4 if is_one_file else 3) // 3
    num_samples = tuple(len(part.rows) for part in parts)
    tell(f"{' and '.join(map(str, num_samples))} samples, about {nbytes / 2**20:.1f} MiB")
    if nbytes > config.max_mib * 2**20:
        raise ConfigError(
            f"max_mib={config.max_mib:g}: the export would have about {nbytes / 2**20:.0f} MiB. Choose fewer "
            "--samples, or raise --max-mib."
        )
    with _put_whole(out) as temp:
        if is_one_file:
            with TemporaryDirectory() as folder:
                _write_site(Path(folder), page={}, parts=parts)
                files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in _files(Path(folder))}
            temp.write_bytes(inline_page(page, files))
        else:
            _write_site(temp, page, parts)
        written = temp.stat().st_size if is_one_file else sum(path.stat().st_size for path in _files(temp))
    return ExportSummary(
        out=str(out),
        caches=tuple(part.name for part in parts),
        num_samples=num_samples,
        has_images=any(part.has_images for part in parts),
        has_views=any(part.has_views for part in parts),
        nbytes=written,
        seconds=time.monotonic() - start_s,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """What is exported of a cache."""

    name: str
    pictures: Pictures
    rows: list[int]
    has_images: bool
    has_views: bool

    @property
    def cache(self) -> Cache:
        return self.pictures.cache

    @property
    def nbytes(self) -> int:
        """About what it takes, rather more: pixels are counted as if they could not be compressed."""
        cache, layout, policy = self.cache, self.cache.reader.layout, self.cache.policy
        fixed = sum(array.nbytes for array in self.cache.state.values())
        if (bias_LHQK := cache.reader.bias_LHQK) is not None:
            fixed += bias_LHQK.nbytes
        of_view = int(cache.describe()["codes_nbytes_per_view"] * 1.2)
        of_view += policy.image_height * policy.image_width * 3 if self.has_views else 0
        images = int(cache.reader.samples.nbytes_S[self.rows].clip(0).sum()) if self.has_images else 0
        return fixed + len(self.rows) * layout.num_views * of_view + images + 2**16


def _choose(config: ViewConfig, tell: Callable[[str], None]) -> list[_Part]:
    """What is exported: the chosen samples of the first cache, and of the second those that it has too."""
    parts: list[_Part] = []
    keys: list[str] = []
    for place in config.caches:
        pictures = Pictures(place, config.data)
        cache = pictures.cache
        if not parts:
            rows = choose_rows(cache, config.samples, DEFAULT_SAMPLES)
            keys = [cache.reader.samples.sample_key(row) for row in rows]
        else:
            rows = rows_of_keys(cache, keys)
            if not rows:
                raise CacheMissError(f"{cache.path} has none of the samples that were chosen, such as {keys[0]!r}.")
        no_views, no_images = why_no_views(cache, rows), _why_no_images(pictures, rows)
        if no_views is not None:
            tell(f"without the views that the teacher saw: {no_views}")
        if no_images is not None:
            tell(f"without the clean images: {no_images}")
        name = name_caches([*(part.cache.path for part in parts), cache.path])[-1]
        parts.append(
            _Part(name=name, pictures=pictures, rows=rows, has_images=no_images is None, has_views=no_views is None)
        )
    return parts


def _why_no_images(pictures: Pictures, rows: list[int]) -> str | None:
    """Why none of the images can be had; None if one can."""
    reason: str | None = None
    for row in rows:
        try:
            pictures.image(row)
        except AtcacheError as error:
            reason = reason or str(error)
        else:
            return None
    return reason


def _write_site(folder: Path, page: dict[str, bytes], parts: list[_Part]) -> None:
    """The files of `site`, in a folder."""
    names: list[dict[str, str]] = []
    for name, data in page.items():
        make_folder((folder / name).parent)
        (folder / name).write_bytes(data)
    for number, part in enumerate(parts):
        root, images = f"caches/{number}/", f"images/{number}/"
        names.append({"name": part.name, "root": root, **({"images": images} if part.has_images else {})})
        write_chosen(folder / root, part.cache, part.rows, has_views=part.has_views)
        if part.has_images:
            make_folder(folder / images)
            for new_row, row in enumerate(part.rows):
                _write_image(folder / images / str(new_row), part.pictures, row)
    (folder / "site.json").write_bytes(describe_site(names))


def _write_image(file: Path, pictures: Pictures, row: int) -> None:
    try:
        found, _ = pictures.image(row)
    except AtcacheError:
        return  # a sample without an image, which the page says
    file.write_bytes(found.pread(found.nbytes, 0))


def inline_page(page: dict[str, bytes], files: dict[str, bytes]) -> bytes:
    """The page as one HTML file, with its script, its style and these files in it."""
    html = page["index.html"].decode()
    carried = {**{name: data for name, data in page.items() if not name.startswith("assets/")}, **files}
    del carried["index.html"]
    html = _STYLE.sub(lambda match: f"<style>{page[match[1]].decode()}</style>", html)
    # What HTML would take for the end of the element can only be in a text or pattern of the script.
    html = _SCRIPT.sub(lambda match: f'<script type="module">{_inside_script(page[match[1]].decode())}</script>', html)
    encoded = json.dumps({name: base64.b64encode(data).decode() for name, data in carried.items()})
    if "</body>" not in html or "./assets/" in html:
        raise ConfigError("the built page is not of the form that can become one file. Build it again: make page.")
    before, _, after = html.rpartition("</body>")
    element = f'<script type="application/json" id="inlined">{encoded}</script>'
    return f"{before}{element}\n</body>{after}".encode()


def _inside_script(code: str) -> str:
    """JavaScript as it may stand in an element."""
    return re.sub(r"<(?=/script|!--)", r"\\x3c", code, flags=re.IGNORECASE)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def _put_whole(out: Path) -> Generator[Path]:
    """A temp place beside `out` that becomes it at the end, or is removed after an error."""
    make_folder(out.absolute().parent)
    temp = partial_path(out)
    with disk_errors_explained(out):
        try:
            yield temp
            temp.rename(out)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            temp.unlink(missing_ok=True)
            raise
