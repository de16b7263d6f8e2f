"""Datasets on a hub: a small server that answers as the Hugging Face hub does, asked by the hub's own client."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atcache.images.source import index_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONVERTED = "fedcba9876543210fedcba9876543210fedcba98"
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108020000009077"
    "53de0000000c4944415408d763606060000000040001f61738550000000049454e44ae426082"
)


@pytest.fixture
def files(tmp_path) -> dict[str, dict[str, bytes]]:
    """The files of each repository and commit: on main; on the converted branch; in neither; no such branch."""
    features = {"image": {"_type": "Image"}, "label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}

    def parquet(num_rows: int) -> bytes:
        table = pa.table(
            {
                "image": pa.array(
                    [{"bytes": PNG, "path": f"{row}.png"} for row in range(num_rows)],
                    pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
                ),
                "label": pa.array([row % 2 for row in range(num_rows)]),
            }
        ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, tmp_path / "made.parquet")
        return (tmp_path / "made.parquet").read_bytes()

    return {
        f"org/animals {COMMIT}": {
            "README.md": b"x",
            "data/train-00000-of-00001.parquet": parquet(5),
            "data/test-00000-of-00001.parquet": parquet(2),
        },
        f"org/pictures {COMMIT}": {"pictures.py": b"x"},
        f"org/pictures {CONVERTED}": {"default/train/0000.parquet": parquet(3)},
        f"org/texts {COMMIT}": {"README.md": b"x"},
        f"org/texts {CONVERTED}": {},
        f"org/code {COMMIT}": {"README.md": b"x"},
    }


@pytest.fixture
def hub(files) -> Iterator[str]:
    """The address of the server."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = self.path.strip("/").split("/")
            if parts[:2] == ["api", "datasets"]:
                name = "/".join(parts[2:4])
                revision = "/".join(parts[5:]).replace("%2F", "/") or "main"
                if name == "org/gated":
                    return self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
                commit = {"main": COMMIT, "refs/convert/parquet": CONVERTED}.get(revision, revision)
                found = files.get(f"{name} {commit}")
                if found is None:
                    is_known = any(known.startswith(f"{name} ") for known in files)
                    code = "RevisionNotFound" if is_known else "RepoNotFound"
                    return self._answer(404, b"", {"X-Error-Code": code})
                about = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in found]}
                return self._answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
            name, commit, file = "/".join(parts[1:3]), parts[4], "/".join(parts[5:])
            data = files[f"{name} {commit}"][file]
            return self._answer(200, data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def pack_from(hub: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command; the hub's address must be set before its client is imported."""
    hub_settings = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "atcache.cli.main", "pack", "--out", str(tmp_path / "out"), *arguments],
        env={**os.environ, **hub_settings, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
    )


def test_a_split_of_a_dataset_is_packed_and_its_commit_is_recorded(hub, tmp_path):
    done = pack_from(hub, tmp_path, "--data", "hf:org/animals", "--split", "train")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["source"] == f"hf:org/animals@{COMMIT}"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "animals-train-000000.tar",
        "animals-train-source.json",
        "classes.txt",
    ]
    recorded = json.loads((tmp_path / "out/animals-train-source.json").read_text())
    assert recorded == {"source": f"hf:org/animals@{COMMIT}", "subset": None, "split": "train"}
    index = index_source(tmp_path / "out")
    assert sorted(zip(index.keys_S.tolist(), index.label_S.tolist(), strict=True)) == [
        (f"{row}".encode(), row % 2) for row in range(5)
    ]


def test_a_dataset_without_parquet_files_is_taken_from_the_hubs_own_copy(hub, tmp_path):
    done = pack_from(hub, tmp_path, "--data", "hf:org/pictures", "--labels", "none")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"] == f"hf:org/pictures@{CONVERTED}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["hf:org/animals"],
            "hf:org/animals: there is more than one split; it has test, train. Give one with --split.",
        ),
        (["hf:org/none"], "hf:org/none: the hub has no such dataset. Check the name, ORG/NAME; a private one needs"),
        (["hf:org/animals", "--revision", "v9"], "the hub has no such dataset or revision 'v9'"),
        (["hf:org/gated"], "accept its terms on https://huggingface.co/datasets/org/gated and set the environment"),
        (["hf:org/texts"], "hf:org/texts has no parquet files. Load it with `datasets`"),
        (["hf:org/code"], "hf:org/code has no parquet files. Load it with `datasets`"),  # nor a copy of the hub's
        (["hf:a/b--c"], "hf:a/b--c: the hub has no such dataset"),
        (["hf:a/b/c", "--name", "x"], "data=hf:a/b/c: expected hf:ORG/NAME"),
    ],
)
def test_what_the_hub_has_not_is_one_sentence(arguments, sentence, hub, tmp_path):
    done = pack_from(hub, tmp_path, "--data", *arguments)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path):
    done = pack_from("http://127.0.0.1:9", tmp_path, "--data", "hf:org/animals")
    assert done.returncode == 1
    assert "hf:org/animals: the Hugging Face hub cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
