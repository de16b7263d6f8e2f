"""The card of a published cache: a part of the repository's README.md, between two markers that name the cache.

Cards of several caches follow one another. A README.md without any such marker is someone's own and is left alone.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from atcache.cache.cache import Cache
from atcache.files.location import Url
from atcache.files.sizes import size_text

CardState = Literal["written", "renewed", "unchanged", "left alone"]

_MARKER = "<!-- atcache "
_KNOWN_LICENCES = (
    "apache-2.0",
    "bsd-2-clause",
    "bsd-3-clause",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "cc-by-sa-4.0",
    "cc0-1.0",
    "mit",
    "openrail",
)
"""Names of licences that a hub knows and that weights have."""
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (10**7, "1M<n<10M"))


def renew_card(readme: str | None, cache: Cache, place: Url) -> tuple[str | None, CardState]:
    """The README.md to write, or None to leave it as it is; and what becomes of it.

    Args:
        readme: the repository's, None if it has none.
        cache: the cache that is published.
        place: where, as the user names it.
    """
    begin, end = (f"{_MARKER}{place.key or '.'}: {word} -->" for word in ("begin", "end"))
    part = f"{begin}\n{_describe(cache, place)}\n{end}"
    if readme is None:
        return f"{_header(cache, place)}\n{part}\n", "written"
    before, found, rest = readme.partition(begin)
    _, closed, after = rest.partition(end)
    if not found and _MARKER in readme:
        return f"{readme.rstrip()}\n\n{part}\n", "renewed"
    if not closed:
        return None, "left alone"
    renewed = f"{before}{part}{after}"
    return (None, "unchanged") if renewed == readme else (renewed, "renewed")


def _header(cache: Cache, place: Url) -> str:
    """What a hub reads: YAML, in which JSON texts are valid."""
    licence = (cache.record.licence or "").lower()
    num_samples = cache.reader.layout.num_real_samples
    size = next((name for limit, name in _SIZES if num_samples < limit), "n>10M")
    name = json.dumps(place.repository.partition("/")[2])
    return "\n".join(
        [
            "---",
            f"license: {licence if licence in _KNOWN_LICENCES else 'other'}",
            f"pretty_name: {name}",
            "tags: [atcache, attention, attention-transfer, knowledge-distillation, vision-transformer, zarr]",
            f"size_categories: [{size}]",
            "viewer: false",
            "---",
            "",
            f"# {place.repository.partition('/')[2]}",
            "",
        ]
    )


def _describe(cache: Cache, place: Url) -> str:
    about, layout = cache.describe(), cache.reader.layout
    rows = [
        ("teacher", _teacher(cache, about)),
        ("licence of its weights", _licence(cache)),
        ("images", _images(cache, about)),
        ("views", _views(cache, about)),
        ("attention", _attention(cache, about)),
        ("codec", _codec(about)),
        ("fidelity", _fidelity(cache, about)),
        ("size", _size(about)),
    ]
    width = max(len(name) for name, _ in rows)
    table = [f"| {'what':<{width}} | this cache |", f"|{'-' * (width + 2)}|---|"]
    table += [f"| {name:<{width}} | {text} |" for name, text in rows]
    layer = cache.geometry.layers[-1]
    return "\n".join(
        [
            f"The attention of `{about['teacher']['name']}` over {_count(about['num_samples'], 'image')}, kept by "
            "atcache: vision transformers are trained from it without the teacher.",
            "",
            *table,
            "",
            "Open it where it is:",
            "",
            "```python",
            "import atcache",
            "",
            f'cache = atcache.open("{place}")',
            f"attn_SHQK = cache.maps(layer={layer})[0, :8].compute()  # of 8 images, in view 0",
            "```",
            "",
            "Or copy it, and train a student:",
            "",
            "```sh",
            f"atcache pull {place} cache.zarr",
            "atcache train --mode distill --cache cache.zarr --out runs/distill"
            + ("" if layout.pixels is not None else " --data where/the/tars/are"),
            "```",
            "",
            "**Licences.** The maps were computed from the teacher's weights and from the images. Whether the "
            "licences of the two allow you to publish or use what was computed from them, atcache cannot know and did "
            "not check. "
            + _images_licence(cache)
            + " Whoever publishes this cache should say here what holds, outside of the two markers around this text.",
        ]
    )


def _teacher(cache: Cache, about: dict[str, Any]) -> str:
    record = cache.record
    sha256 = about["teacher"]["weights_sha256"][:12]
    return f"`{about['teacher']['name']}`, weights `{record.weights_from}` (SHA-256 {sha256}...)"


def _licence(cache: Cache) -> str:
    known = cache.record.licence
    return f"{known}, as timm or the weights' config says" if known else "not known: see where the weights come from"


def _images(cache: Cache, about: dict[str, Any]) -> str:
    samples = cache.reader.samples
    names = [f"`{tar.name}`" for tar in (samples.tars[0], samples.tars[-1])]
    tars = names[0] if len(samples.tars) == 1 else f"{len(samples.tars)} tars, {names[0]} to {names[1]}"
    fingerprint = about["source"]["fingerprint"][:12]
    size = size_text(sum(samples.tar_nbytes))
    return f"{_count(about['num_samples'], 'image')} in {tars} ({size}, fingerprint {fingerprint}...)"


def _views(cache: Cache, about: dict[str, Any]) -> str:
    policy = cache.policy
    corrupted = "" if policy.corrupt is None else f" corrupted by {policy.corrupt}"
    stored = "stored in the cache" if cache.reader.layout.pixels is not None else "made again from the tars"
    return (
        f"{_count(about['num_views'], 'view')} an image: {policy.name}{corrupted}, seed {policy.seed}, "
        f"{policy.image_height} x {policy.image_width} pixels, {stored}"
    )


def _attention(cache: Cache, about: dict[str, Any]) -> str:
    geometry = cache.geometry
    kept = {"all": "whole maps", "cls": "rows of the class token", "prefix": "rows of the prefix tokens"}
    extras = [name for name, is_stored in (("v", about["stores_v"]), ("x", about["stores_x"])) if is_stored]
    return (
        f"{_count(len(geometry.layers), 'layer')} x {_count(len(geometry.heads), 'head')}, {about['num_tokens']} "
        f"tokens, {kept[geometry.queries]}" + (f", with {' and '.join(extras)}" if extras else "")
    )


def _codec(about: dict[str, Any]) -> str:
    codec = about["codec"]
    settings = ", ".join(f"{name} {value}" for name, value in codec.items() if name != "name" and value is not None)
    return f"{codec['name']}" + (f" ({settings})" if settings else "")


def _fidelity(cache: Cache, about: dict[str, Any]) -> str:
    calibration, quality = cache.record.calibration, about["quality"].get("row_kl_nats")
    while_built = f"row KL {quality['mean']:.2g} nats on average, {quality['max']:.2g} at most; " if quality else ""
    return (
        f"{while_built}before the build, on other views, {calibration.row_kl_nats:.2g} nats, and the teacher's "
        f"features off by {calibration.injected_error:.2g} with decoded maps"
    )


def _size(about: dict[str, Any]) -> str:
    times = about["times_smaller_than_float16_maps"]
    smaller = f"; codes are {times:.3g} times smaller than float16 maps" if times else ""
    return f"{size_text(about['nbytes'])}, {about['nbytes_per_view']} bytes a view{smaller}"


def _images_licence(cache: Cache) -> str:
    if cache.reader.layout.pixels is not None:
        return "**The augmented images themselves are in the cache.**"
    return "The images are not in the cache; their keys, sizes and labels are, and the folder the tars were in."


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
