"""Teachers of transformers from a hub: revisions are recorded, and what the hub refuses is said in a sentence.

The libraries read the hub's address once, when they are imported, so names are loaded in a process of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from foreign_models import save_transformers
from hub_server import COMMIT, serve_hub

LOAD = """
import json, sys
from atcache.errors import TeacherError
from atcache.teachers.load import load_teacher

for name in sys.argv[1:]:
    try:
        teacher = load_teacher(name)
        print(json.dumps([str(teacher.name), teacher.source, teacher.weights_sha256]))
    except TeacherError as error:
        print(json.dumps(str(error)))
"""


def load(home, address, *names):
    environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": address}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *names], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def test_a_hubs_models_are_loaded_and_their_commit_is_recorded(tmp_path, home):
    save_transformers(tmp_path / "org" / "vit", "vit")
    with serve_hub(tmp_path) as address:
        names = [f"transformers:{name}" for name in ("org/vit", "org/vit@v1", "org/vit@nope", "gated/vit", "org/none")]
        first, tagged, *refused = load(home, address, *names)
    assert first[:2] == ["transformers:org/vit", f"hub:org/vit@{COMMIT}"]
    assert tagged[:2] == ["transformers:org/vit@v1", f"hub:org/vit@{COMMIT}"]
    assert first[2] == tagged[2]
    assert [sentence.partition(": ")[2] for sentence in refused] == [
        "https://huggingface.co/org/vit has no such revision.",
        "its authors ask you to agree to a licence. Do so at https://huggingface.co/gated/vit, and give your token: "
        "hf auth login.",
        "there is no public repository https://huggingface.co/org/none, or it needs your token: hf auth login.",
    ]
    # Nobody listens any more: the copy is used, and what has no copy is refused at once.
    again, unreachable = load(home, address, names[0], "transformers:org/other")
    assert again == first
    assert unreachable == (
        "model transformers:org/other: the Hugging Face hub cannot be reached. Download "
        "https://huggingface.co/org/other elsewhere, and give the folder: transformers:FOLDER. If "
        "org/other is meant to be a folder, there is none here."
    )
