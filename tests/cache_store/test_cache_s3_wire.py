"""What happens on the wire between a worker and its store loses nothing, and ends with the right kind of error."""

from __future__ import annotations

import socket

import pytest
from cache_samples import TENSORS, all_names, commit, fill, full_cache, make_store
from s3_proxy import proxying

from alignkd.cache_store.errors import StorageAccessError, StorageError
from alignkd.cache_store.protocol.maintenance.convert import convert
from alignkd.cache_store.protocol.maintenance.repair import repair
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.storage import open_storage
from alignkd.errors import is_transient

pytestmark = [pytest.mark.s3, pytest.mark.slow]

WRITES = ("tensors/head", "plan/keys", "cache.json", "shards/000000", "commits/000001", "runs/")
KINDS = ("500", "503", "reset", "reset late", "truncated", "trickle")


@pytest.fixture
def wire(s3, s3_url, monkeypatch):
    """The proxy, and the store of this test through it."""
    from fsspec.config import conf

    with proxying(s3.endpoint) as proxy:
        monkeypatch.setitem(conf["s3"], "endpoint_url", proxy.endpoint)
        yield proxy


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_is_written_whole_through_a_bad_wire(wire, s3_url, kind):
    faults = [wire.fail(kind, "PUT", name, times=2) for name in WRITES]
    store = fill(make_store(s3_url, shard_samples=5, tensors=TENSORS), reject=(4,))
    store.write_run({"seed": 1})
    # An answer to a PUT has no body to be reset within: then it arrives.
    assert all(fault.met >= 1 for fault in faults)
    report = verify(s3_url)
    assert (report.problems, report.strays, report.rows, report.rejected) == ([], [], 9, 1)
    assert len(all_names(store.storage)) == 1 + 2 + 2 + 1 + 2 + 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_is_read_whole_through_a_bad_wire(wire, s3_url, kind):
    full_cache(s3_url)
    for name in ("cache.json", "commits/", "shards/", "tensors/", "list-type"):
        wire.fail(kind, "GET", name, times=2)
    reader = CacheReader(s3_url)
    assert len(list(reader.rows(reader))) == 9
    assert (reader.tensors["head"] == TENSORS["head"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_repair_goes_on_through_a_bad_wire(wire, s3_url, kind):
    storage = full_cache(s3_url)
    storage.delete("commits/000001.json")
    storage.write("commits/000001.json", b"{}")
    for method in ("GET", "DELETE", "HEAD"):
        wire.fail(kind, method, times=2)
    assert repair(s3_url).shards_to_do == 1


def test_a_conversion_goes_on_through_a_bad_wire(wire, s3_url, tmp_path):
    full_cache(tmp_path)
    for kind in KINDS:
        wire.fail(kind, "PUT", times=2)
    convert(tmp_path, s3_url)
    assert verify(s3_url).content_sha256 == verify(tmp_path).content_sha256


@pytest.mark.parametrize("kind", ["500", "503", "reset", "truncated"])
def test_a_wire_that_stays_bad_is_a_fault_that_may_pass_and_leaves_nothing_half(wire, s3_url, kind):
    store = make_store(s3_url, samples=4)
    wire.fail(kind, "PUT", "shards/", times=-1)
    with pytest.raises(StorageError, match=r"tried 6 times") as caught:
        commit(store, 0)
    assert is_transient(caught.value)
    wire.faults.clear()
    assert (verify(s3_url).problems, verify(s3_url).shards_done) == ([], 0)
    fill(store)
    assert verify(s3_url).rows == 4


def test_keys_that_expired_are_read_anew_once(wire, s3_url):
    storage = open_storage(s3_url)
    fault = wire.fail("expired", "PUT")
    assert storage.write("a", b"x")
    assert fault.met == 1


def test_keys_that_stay_expired_are_a_refusal_that_says_to_renew_them(wire, s3_url):
    storage = open_storage(s3_url)
    fault = wire.fail("expired", "PUT", times=-1)
    with pytest.raises(StorageAccessError, match=r"cannot write .*/a: .*The keys have expired: renew them") as caught:
        storage.write("a", b"x")
    assert fault.met == 2
    assert not is_transient(caught.value)


def test_without_credentials_it_is_said_which_to_set(wire, s3_url, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageAccessError, match=r"NoCredentialsError.*Set credentials \(for S3: AWS_ACCESS_KEY_ID"):
        open_storage(s3_url).names("")


@pytest.mark.parametrize(
    ("number", "kind"), [(socket.EAI_NONAME, StorageAccessError), (socket.EAI_AGAIN, StorageError)], ids=["unknown", "later"]
)
def test_a_machine_of_no_known_name_is_a_refusal_and_a_name_server_that_does_not_answer_is_not(
    wire, s3_url, monkeypatch, number, kind
):
    from fsspec.config import conf

    def unknown(*_arguments, **_options):
        raise socket.gaierror(number, "no address")

    monkeypatch.setitem(conf["s3"], "endpoint_url", "http://store.invalid:80")
    storage = open_storage(s3_url)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(kind, match=r"cannot list"):
        storage.names("")
