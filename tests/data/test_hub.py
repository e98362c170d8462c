"""Data sets of a hub: what is asked of it, and what is known without it."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from stand_in import write_parquet

from rho1_jax.data import corpora, hub
from rho1_jax.data.corpora import Source
from rho1_jax.errors import InputError

ROOT = Path(__file__).parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The three things that are asked of a hub: a revision, its files, a file."""

    folder: Path

    def do_GET(self):  # noqa: N802
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/some/set/revision/"):
            return self.answer(json.dumps({"id": "some/set", "sha": SHA, "siblings": []}).encode())
        if path.startswith("/api/datasets/some/set/tree/"):
            files = [f for f in sorted(self.folder.rglob("*")) if f.is_file()]
            listing = [
                {
                    "type": "file",
                    "path": str(f.relative_to(self.folder)),
                    "size": f.stat().st_size,
                    "oid": f.name,
                }
                for f in files
            ]
            return self.answer(json.dumps(listing).encode())
        if path.startswith(f"/datasets/some/set/resolve/{SHA}/"):
            return self.answer((self.folder / path.split("/", 6)[-1]).read_bytes())
        return self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def answer(self, body):
        self.send_response(200)
        self.send_header("ETag", f'"{len(body)}-{hash(body) % 10**9}"')
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


HUB_SCRIPT = """
import sys
from rho1_jax.data import corpora, records
for spec in sys.argv[1:]:
    for split, document in corpora.split_documents(corpora.Source(spec)):
        print(split, document.text)
"""


def hub_run(cache, *specs, **environment):
    result = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT, *specs],
        env=os.environ | {"HF_HOME": str(cache)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.splitlines(), result.stderr


def test_hub_dataset_online_and_offline(tmp_path):
    folder = tmp_path / "repo"
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", ["one", "two"])
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", ["three"])
    write_parquet(folder / "other" / "part.parquet", ["four"])
    (folder / "README.md").write_text("not text of the corpus")
    handler = type("HubOfTest", (Hub,), {"folder": folder})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = tmp_path / "cache"
    try:
        lines, _ = hub_run(
            cache,
            "hf:some/set/data@main",
            "hf:some/set/other",
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
        )
    finally:
        server.shutdown()
        server.server_close()
    assert lines[:3] == ["val three", "train one", "train two"]
    assert lines[3].endswith(" four")

    offline = {"HF_HUB_OFFLINE": "1"}
    assert hub_run(cache, "hf:some/set/data", **offline)[0] == lines[:3]
    lines, error = hub_run(cache, "hf:some/other", **offline)
    assert not lines
    assert re.search("InputError: The hub dataset 'some/other' cannot be fetched", error)


def test_a_hub_is_asked_for_its_files_only(monkeypatch):
    names = ["data/train.parquet", "README.md"]
    monkeypatch.setattr(hub.huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: names)
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", None)
    corpora.require_readable(Source("hf:some/set/data"))
    with pytest.raises(InputError, match="'some/set' has no parquet files in other"):
        corpora.require_readable(Source("hf:some/set/other"))
