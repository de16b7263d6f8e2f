"""`benchmarks/gpu.py` makes the most of a GPU that is lent for minutes: no stage costs another, and nothing is lost."""

from __future__ import annotations

import json
import re
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
HANGS = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("measured 7 of 9,", child.pid)
time.sleep(600)
"""


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_stage_that_hangs_or_fails_costs_no_other_and_keeps_what_it_printed(gpu, monkeypatch, tmp_path, capsys):
    stages = [
        gpu.Stage("hangs", 10, ["-c", HANGS]),
        gpu.Stage("fails", 60, ["-c", "print('before'); raise SystemExit(3)"]),
        gpu.Stage("good", 60, ["-c", "import os, atcache.pipelines; print(os.environ['FOR_IT'])"], {"FOR_IT": "yes"}),
    ]
    monkeypatch.setattr(gpu, "STAGES", stages)
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--minutes", "2", "--out", str(tmp_path / "out")])
    assert ended.value.code == 1, "two stages are not finished"
    found = {each.stem: each.read_text() for each in (tmp_path / "out").glob("*.txt")}
    assert found["fails"] == "before\n"
    assert found["good"] == "yes\n"
    assert found["hangs"].startswith("measured 7 of 9")
    assert not is_alive(int(found["hangs"].split()[-1])), "what a stage has started ends with it"
    ends = {end["stage"]: end["ended"] for end in json.loads((tmp_path / "out" / "summary.json").read_text())}
    assert ends == {"hangs": "stopped after 10 s", "fails": "failed with status 3", "good": "finished"}
    assert "measured 7 of 9" in capsys.readouterr().out


def test_stages_share_the_minutes(gpu, monkeypatch, tmp_path):
    endless = ["-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(gpu, "STAGES", [gpu.Stage(name, 600, endless) for name in ("first", "second")])
    monkeypatch.setattr(gpu, "LEAST_S", 1)
    with pytest.raises(SystemExit):
        gpu.main(["--minutes", str(12 / 60), "--out", str(tmp_path)])
    ends = [end["ended"] for end in json.loads((tmp_path / "summary.json").read_text())]
    assert 1 < int(re.fullmatch(r"stopped after (\d+) s", ends[0]).group(1)) <= 12, "of the 600 it may take"
    assert ends[1] == "not begun: no time was left"


def test_a_run_whose_stages_finish_or_have_no_time_exits_well(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "STAGES", [gpu.Stage(name, 60, ["-c", "print('here')"]) for name in ("first", "second")])
    gpu.main(["--minutes", "2", "--out", str(tmp_path), "--only", "second"])
    monkeypatch.setattr(gpu, "LEAST_S", 10**6)
    gpu.main(["--minutes", "2", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.glob("*.txt")] == ["second.txt"]


def test_a_stage_of_another_name_is_refused(gpu, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--only", "kernels,nonsense"])
    assert "--only nonsense: there is no such stage" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("pip") is None, reason="installs with pip, which this environment lacks")
def test_without_an_installed_atcache_this_copy_is_installed_into_the_folder(gpu, monkeypatch, tmp_path):
    # A machine with torch, timm and pip, but without atcache: a `.pth` file adds packages, and heeds no other `.pth`.
    venv.create(tmp_path / "venv", with_pip=False)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    monkeypatch.setattr(gpu.sys, "executable", str(tmp_path / "venv/bin/python"))
    out = tmp_path / "out"
    out.mkdir()
    stage = gpu.Stage("imports", 60, ["-c", "import atcache.cli.main as main; print(main.__file__)"])
    assert gpu.run(stage, 60, out, gpu.environment_of(out))["ended"] == "finished"
    assert (out / "imports.txt").read_text().strip() == str(out / "site/atcache/cli/main.py")
