from __future__ import annotations

import secrets

import fsspec
import pytest


@pytest.fixture(autouse=True)
def own_local_cache(tmp_path, monkeypatch):
    """Copies of files from elsewhere lie in the test's own folder."""
    monkeypatch.setenv("ALIGNKD_CACHE", str(tmp_path / "local-cache"))
    monkeypatch.delenv("ALIGNKD_CACHE_SIZE", raising=False)
    return tmp_path / "local-cache"


@pytest.fixture
def put(request, tmp_path):
    """Puts a folder where the test's storage is, and returns its path or URL."""

    def upload(folder, base):
        fs, root = fsspec.core.url_to_fs(base, skip_instance_cache=True)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                fs.pipe_file(f"{root}/{path.relative_to(folder)}", path.read_bytes())
        return base

    kind = request.param
    if kind == "path":
        return str
    if kind == "file":
        return lambda folder: f"file://{folder}"
    if kind == "memory":
        return lambda folder: upload(folder, f"memory://{secrets.token_hex(8)}/d")
    return lambda folder: upload(folder, request.getfixturevalue("s3_url") + "/" + secrets.token_hex(4))
