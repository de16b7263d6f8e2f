"""Write docs/families.md from the table in the code: `python docs/make_families.py`.

The page is never edited by hand; a test compares it with what this script makes.
"""

from __future__ import annotations

from pathlib import Path

from atcache.teachers.families import FAMILIES, Family
from atcache.teachers.names import ALIASES

FOLDER = Path(__file__).parent
SAID = {
    "transfers": "works, with a plain student too",
    "needs its components": "fails with a plain student; works if the student has the components",
    "not known": "not known",
}
BEGINNING = """# Families of teachers: does their attention transfer?

Attention transfer does not work for every teacher and every student.
[arXiv 2605.07191](https://arxiv.org/abs/2605.07191) tried 20 teachers of 11 families with a plain ViT as the student.
In 7 families attention transfers. In 4 it fails: the student ends up to 5.1% below one from scratch. If the student has
the components of its teacher's architecture, with fresh weights, all 4 succeed. The components alone do not help a
student from scratch. The table names those families of the 11 that the sources of this page name.

By default, an atcache student has its teacher's architecture, so it has all components. `atcache plan` and
`atcache train` say a teacher's family, what is known of it, its components, and what a `--student` of your own lacks.

"Not known" means that the sources of this page do not say it. The sources are:

- [arXiv 2411.09702](https://arxiv.org/abs/2411.09702), the paper that introduced attention transfer
- the abstract of [arXiv 2605.07191](https://arxiv.org/abs/2605.07191)
- [a summary of arXiv 2605.07191](https://www.besthub.dev/articles/why-attention-transfer-fails-for-dinov2-and-other-modern-vits-architecture-mismatch-revealed-2c619405c99e),
  which names six groups of teachers: DINO and DeiT, which transfer, and DINOv2, DINOv2 with registers, CLIP and
  BEiT v2, which fail

[`atcache probe`](guide/probe.md) measures it on your images.

Components are those of the model in the second column, where it differs from a plain ViT. Other models of the family
may have more: the largest DINOv2 and DINOv3 models also have a gated MLP.
"""
END = """This page is made from `atcache/teachers/families.py`, by `python docs/make_families.py`.

Next: [The API](api.md)
"""


def make_page() -> str:
    """The text of families.md."""
    heading = "| family | for example | components | attention transfer | what the source says | source |"
    rows = "\n".join(map(_row, sorted(FAMILIES, key=_rank)))
    return f"{BEGINNING}\n{heading}\n|---|---|---|---|---|---|\n{rows}\n\n{END}"


def _rank(family: Family) -> tuple[int, str]:
    """What works first, then what fails, then what is not known; by name."""
    return [*SAID].index(family.outcome), family.name


def _row(family: Family) -> str:
    example = f"`{family.example}`"
    if family.example in ALIASES:
        example += f", `{ALIASES[family.example]}`"
    cells = (
        family.name,
        example,
        ", ".join(family.components) or "none: a plain ViT",
        SAID[family.outcome],
        family.evidence or "-",
        family.source or "-",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    (FOLDER / "families.md").write_text(make_page(), encoding="utf-8")
