"""A small Hugging Face hub on this machine: repositories are folders, and each has one commit."""

from __future__ import annotations

import hashlib
import http.server
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMIT = "0123456789" * 4


@contextmanager
def serve_hub(root: Path) -> Iterator[str]:
    """The address of a hub with the repositories root/ORG/MODEL.

    Those of the organisation "gated" need a licence, and downloads from "broken" end in the middle.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            """Say nothing."""

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def break_off(self, nbytes):
            self.send_response(200)
            self.send_header("Content-Length", str(nbytes))
            self.end_headers()
            # Without lingering, the other side sees a reset connection.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()
            self.close_connection = True

        def do_GET(self):
            match self.path.partition("?")[0].strip("/").split("/"):
                case ["api", "models", org, model, *rest]:
                    revision, file = (rest[1] if rest else "main"), None
                case [org, model, "resolve", revision, *names]:
                    file = root / org / model / "/".join(names)
                case _:
                    return self.answer(404)
            if org == "gated":
                return self.answer(403, X_Error_Code="GatedRepo")
            if not (root / org / model).is_dir():
                return self.answer(404, X_Error_Code="RepoNotFound")
            if revision not in ("main", "v1", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if file is None:
                about = {"id": f"{org}/{model}", "sha": COMMIT, "siblings": []}
                return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
            if not file.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            body = file.read_bytes()
            if org == "broken" and self.command == "GET":
                return self.break_off(len(body))
            return self.answer(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
