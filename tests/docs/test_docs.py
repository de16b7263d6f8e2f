"""What the README and docs tell people to type exists: commands, options, configuration keys, Python names, files."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import click
import pytest
import torch

import atcache
from atcache.cli.defaults import read_defaults
from atcache.cli.main import COMMANDS, cli
from atcache.errors import ConfigError
from atcache.teachers.names import ALIASES

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
ORDER = [
    "start.md",
    "guide.md",
    "guide/images.md",
    "guide/teachers.md",
    "guide/foreign.md",
    "guide/plan.md",
    "guide/probe.md",
    "guide/build.md",
    "guide/grow.md",
    "guide/train.md",
    "guide/report.md",
    "guide/students.md",
    "guide/python.md",
    "guide/loops.md",
    "guide/evaluate.md",
    "guide/robustness.md",
    "guide/corruptions.md",
    "guide/xarray.md",
    "guide/statistics.md",
    "guide/pictures.md",
    "guide/viewer.md",
    "guide/own-maps.md",
    "guide/verify.md",
    "guide/machines.md",
    "guide/cluster.md",
    "guide/buckets.md",
    "guide/publish.md",
    "look.md",
    "concepts.md",
    "families.md",
    "api.md",
    "api/statistics.md",
    "api/agreement.md",
    "api/pictures.md",
    "api/training.md",
    "api/caches.md",
    "api/moving.md",
    "api/runs.md",
    "format.md",
    "format/transform.md",
    "format/parts.md",
    "format/records.md",
    "format/buckets.md",
    "format/limits.md",
    "design.md",
    "design/data-and-training.md",
    "design/growth.md",
    "design/buckets.md",
    "design/looking.md",
    "design/measuring.md",
    "design/any-teacher.md",
    "benchmarks.md",
    "benchmarks/gpu.md",
    "benchmarks/does-it-work.md",
    "benchmarks/papers-table.md",
    "benchmarks/codecs.md",
    "benchmarks/training.md",
    "benchmarks/reading.md",
    "benchmarks/images.md",
    "scale.md",
]
"""The pages under docs/ in the order in which a reader meets them."""

FENCE = re.compile(r"^[ ]{0,3}```[ ]*(\w*)[^\n]*\n(.*?)^[ ]{0,3}```[ ]*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SHELL = ("sh", "bash", "shell", "console")
SHELL_STOPS = {"|", "||", "&&", ";", "&", ">", ">>", "2>", "2>&1", "<"}


class Block(NamedTuple):
    """One fenced block of a page."""

    page: str
    language: str
    text: str


def blocks_of(pages: list[Path]) -> list[Block]:
    return [
        Block(page.name, language, text)
        for page in pages
        for language, text in FENCE.findall(page.read_text(encoding="utf-8"))
    ]


def calls_of(program: str, shell: str) -> list[list[str]]:
    """The arguments of each call of a program in a shell block; prompts, paths and comments fall away."""
    calls: list[list[str]] = []
    for line in shell.replace("\\\n", " ").splitlines():
        call: list[str] | None = None
        for word in shlex.split(line.strip().removeprefix("$ "), comments=True):
            if word in SHELL_STOPS:
                call = None
            elif call is not None:
                call.append(word)
            elif word.rpartition("/")[2] == program:
                calls.append(call := [])
    return calls


def check_call(arguments: list[str]) -> None:
    """Raise click's usage error if the call names no existing command or option, or has an argument too many."""
    group_context = click.Context(cli, info_name="atcache")
    _, rest, _ = cli.make_parser(group_context).parse_args(args=list(arguments))
    if not rest:
        return
    name, command, rest = cli.resolve_command(group_context, rest)
    assert command is not None
    context = click.Context(command, info_name=name, parent=group_context)
    _, left, _ = command.make_parser(context).parse_args(args=rest)
    if left and left != ["..."]:
        raise click.UsageError(f"'{name}' takes no {left}")


def _exists_in(module: ModuleType, name: str) -> bool:
    """Whether `from module import name` works: an attribute, or a module of the package."""
    return hasattr(module, name) or importlib.util.find_spec(f"{module.__name__}.{name}") is not None


def imported_modules(text: str) -> set[str]:
    """Modules that a block imports, and `module.name` for each name that it imports from one."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


def is_internal(module: str) -> bool:
    """Whether a module is one that docs must not show: a pipeline, or a private one."""
    return f"{module}.".startswith("atcache.pipelines.") or any(part.startswith("_") for part in module.split("."))


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *$", FENCE.sub("", text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        repeats = sum(bool(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", anchor)) for anchor in anchors)
        anchors.add(f"{slug}-{repeats}" if repeats else slug)
    return anchors


def missing_anchors(page: Path) -> list[str]:
    """The links of a page to headings, here or on another page, that do not exist."""
    missing: list[str] = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        if not anchor or path.suffix != ".md" or not path.exists():  # a missing page fails a test of its own
            continue
        if anchor not in anchors_of(path.read_text(encoding="utf-8")):
            missing.append(link)
    return missing


def check_python(text: str) -> None:
    """Raise if the block is no Python, or imports what atcache does not have."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "atcache":
            module = importlib.import_module(node.module or "")
            missing = [alias.name for alias in node.names if not _exists_in(module, alias.name)]
            assert missing == [], f"{node.module} has no {missing}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "atcache":
                    importlib.import_module(alias.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "atcache":
            assert hasattr(importlib.import_module("atcache"), node.attr), f"atcache has no {node.attr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_calls_name_real_commands_and_options(page: Path):
    for block in blocks_of([page]):
        if block.language in SHELL:
            for arguments in calls_of("atcache", block.text):
                try:
                    check_call(arguments)
                except click.UsageError as error:
                    pytest.fail(f"{page.name}: atcache {shlex.join(arguments)}: {error.format_message()}")


PARSE = """
import contextlib, importlib, io, json, sys
sys.path.insert(0, sys.argv[1])
problems = []
for script, arguments in json.load(sys.stdin):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            importlib.import_module(script).parse(arguments)
    except SystemExit as error:
        problems.append([script, arguments, said.getvalue() or str(error)])
print(json.dumps(problems))
"""


def benchmark_calls(text: str) -> list[tuple[str, list[str]]]:
    """The benchmarks that a page calls, in blocks and within lines, and with which arguments."""
    calls = [(script, shlex.split(rest)) for script, rest in re.findall(r"`python benchmarks/(\w+)\.py([^`]*)`", text)]
    for language, block in FENCE.findall(text):
        if language in SHELL:
            for name, value in re.findall(r'^(\w+)="(.*)"$', block, re.MULTILINE):
                block = block.replace(f"${name} ", f"{value} ")
            for script in sorted(set(re.findall(r"benchmarks/(\w+)\.py", block))):
                calls += [(script, arguments) for arguments in calls_of(f"{script}.py", block)]
    return calls


def refused_calls(calls: list[tuple[str, list[str]]]) -> list[list[object]]:
    """The calls that the scripts' own parsers refuse, and what they say; a process of its own imports the scripts."""
    done = subprocess.run(
        [sys.executable, "-c", PARSE, str(ROOT / "benchmarks")],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_documented_benchmarks_and_the_stages_on_a_gpu_are_calls_that_the_scripts_take():
    # The changelog names scripts without their options.
    pages = [page.read_text(encoding="utf-8") for page in PAGES if page.name != "CHANGELOG.md"]
    named = {name for page in pages for name in re.findall(r"benchmarks/(\w+)\.py", page)}
    assert named <= {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    calls = [call for page in pages for call in benchmark_calls(page)]
    assert len(calls) > 25
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    gpu = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = gpu  # where its dataclass looks for its annotations
    spec.loader.exec_module(gpu)
    for stage in gpu.STAGES:
        first, *rest = stage.arguments
        if first.endswith(".py"):
            calls.append((Path(first).stem, rest))
        elif stage.arguments[: len(gpu.ATCACHE)] == gpu.ATCACHE:
            check_call(stage.arguments[len(gpu.ATCACHE) :])
        else:
            assert stage.arguments == gpu.PYTEST
    wrong = ("kernels", ["--sweeep"])
    assert [script for script, *_ in refused_calls([*calls, wrong])] == ["kernels"], refused_calls(calls)


def test_calls_of_benchmarks_are_found():
    page = (
        "Run `python benchmarks/order.py --classes 3`.\n```sh\n"
        'common="--data x --views 2"\nA=1 python benchmarks/read.py $common --rounds 1 \\\n    --samples 2\n```\n'
    )
    expected = ["--data", "x", "--views", "2", "--rounds", "1", "--samples", "2"]
    assert benchmark_calls(page) == [("order", ["--classes", "3"]), ("read", expected)]


@pytest.mark.parametrize(
    ("script", "arguments", "printed"),
    [
        ("order", ["--samples", "4000", "--classes", "10", "--batch-size", "32"], r"\| block \|"),
        ("scale", ["--arithmetic", "--code-nbytes", "200000"], r"200 kB of codes a view.*20\.0 PB in all"),
    ],
)
def test_benchmarks_that_take_seconds_run(script, arguments, printed):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(printed, done.stdout, re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_python_names_what_exists(page: Path):
    for block in blocks_of([page]):
        if block.language in ("python", "py"):
            check_python(block.text)


def test_the_guides_own_loop_trains(tiny_cache):
    (loop,) = [
        block.text for block in blocks_of([DOCS / "guide" / "python.md"]) if "for batch in batches:" in block.text
    ]
    for theirs, ours, count in (
        ("in1k.zarr", str(tiny_cache()), 2),
        ("batch_size=256", "batch_size=24", 1),
        ("epochs=30", "epochs=20", 1),
        ("lr=1e-3", "lr=1e-2", 1),
        ("    optimizer.step()", "    losses.append(float(attention_loss.detach()))\n    optimizer.step()", 1),
        ("    optimizer.zero_grad()", "    optimizer.zero_grad()\n    states.append(batches.state_dict())", 1),
    ):
        assert loop.count(theirs) == count
        loop = loop.replace(theirs, ours)
    scope = {"losses": [], "states": []}
    torch.manual_seed(0)
    exec(loop, scope)  # the guide's own text
    assert [state["step"] for state in scope["states"]] == list(range(1, 41))
    assert sum(scope["losses"][-4:]) < 0.95 * sum(scope["losses"][:4])
    again = atcache.batches(tiny_cache(), batch_size=24, epochs=20)
    again.load_state_dict(scope["states"][29])
    assert len(list(again)) == 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_configuration_is_accepted(page: Path, tmp_path: Path):
    for block in blocks_of([page]):
        if block.language == "toml":
            (tmp_path / "atcache.toml").write_text(block.text)
            for name in tomllib.loads(block.text):
                read_defaults(tmp_path / "atcache.toml", name, COMMANDS[name].load(), all_commands=tuple(COMMANDS))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page: Path):
    targets = [target.partition("#")[0] for target in LINK.findall(page.read_text(encoding="utf-8"))]
    local = [target for target in targets if target and not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_lead_to_one(page: Path):
    assert missing_anchors(page) == []


def test_the_order_of_the_docs_has_every_page():
    assert sorted(ORDER) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize(("page", "following"), list(itertools.pairwise(ORDER)), ids=ORDER[:-1])
def test_a_page_ends_with_a_link_to_the_next(page: str, following: str):
    last_line = (DOCS / page).read_text(encoding="utf-8").rstrip().splitlines()[-1]
    match = re.fullmatch(r"Next: \[[^\]]+\]\(([^)#]+)\)", last_line)
    assert match is not None, f"{page} ends with {last_line!r}"
    assert ((DOCS / page).parent / match[1]).resolve() == DOCS / following


def test_the_page_of_teachers_lists_all_short_names():
    page = (DOCS / "guide" / "teachers.md").read_text(encoding="utf-8")
    listed = re.findall(r"`([^`|]+)` \| `([^`|]+)`", page)
    assert listed == [(name, model) for name, model in ALIASES.items() if name != "demo-mae"]
    assert "`demo-mae`" in page


def test_the_readme_links_to_the_docs_in_order():
    top = [page for page in ORDER if "/" not in page]
    links = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8").partition("## Documentation")[2])
    assert [link.removeprefix("docs/") for link in links if link.removeprefix("docs/") in top] == top


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_short_enough_to_read(page: Path):
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_python_imports_no_internals(page: Path):
    for block in blocks_of([page]):
        if block.language in ("python", "py"):
            assert [module for module in imported_modules(block.text) if is_internal(module)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_fence_says_its_language(page: Path):
    # A block without one would be checked by none of the tests above.
    assert [block.text for block in blocks_of([page]) if not block.language] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_make_targets_exist(page: Path):
    makefile = (ROOT / "Makefile").read_text()
    for block in blocks_of([page]):
        for arguments in calls_of("make", block.text) if block.language in SHELL else []:
            for target in (word for word in arguments if "=" not in word):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"there is no 'make {target}'"


def test_calls_are_found_in_every_shape_of_shell():
    text = "$ atcache build --data x \\\n    --views 2  # 2\nA=1 .venv/bin/atcache info c.zarr | wc\ncat atcache.toml"
    assert calls_of("atcache", text) == [["build", "--data", "x", "--views", "2"], ["info", "c.zarr"]]


def test_the_checks_bite(tmp_path: Path):
    with pytest.raises(click.UsageError, match="No such command 'biuld'"):
        check_call(["biuld"])
    with pytest.raises(click.UsageError, match="No such option"):
        check_call(["--veribose", "build"])
    with pytest.raises(AssertionError, match="atcache has no opne"):
        check_python("import atcache\natcache.opne('x')")
    (tmp_path / "atcache.toml").write_text("[build]\nveiws = 2\n")
    with pytest.raises(ConfigError, match="veiws is not an option"):
        read_defaults(tmp_path / "atcache.toml", "build", click.Command("build"), all_commands=("build",))


def test_the_checks_of_pages_bite(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Why `q`, and what's k?\n```sh\n# no heading\n```\n[a](#why-q-and-whats-k) [b](page.md#no-heading)\n"
    )
    assert missing_anchors(page) == ["page.md#no-heading"]
    assert anchors_of("# Twice\n## Twice\n") == {"twice", "twice-1"}
    found = imported_modules(
        "import atcache.pipelines\nfrom atcache import pipelines\nfrom atcache._x import y\nimport atcache"
    )
    assert {module for module in found if is_internal(module)} == found - {"atcache"}
    assert len(found) == 3
