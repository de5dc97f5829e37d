"""One rule for every store: a name that can be read is complete. And errors are sentences."""

import asyncio
import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
import uuid

import botocore.exceptions
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import save

from stride_ray.corpus.splits import plan
from stride_ray.runtime.errors import StrideError, is_storage_error, storage_reason
from stride_ray.runtime.run import claim
from stride_ray.runtime.storage import Store, seal, tensor_bytes
from stride_ray.runtime.urls import redact_url

TABLE = pa.table({"n": list(range(10_000)), "s": [f"row {i}" for i in range(10_000)]})


@pytest.fixture(params=["local", "memory", "swift", "rclone"])
def store(request, tmp_path):
    if request.param == "local":
        yield Store(str(tmp_path / "run"))
    elif request.param == "memory":
        url = f"memory://{uuid.uuid4().hex}/run"
        yield Store(url)
        Store(url).remove("")
    else:
        with request.getfixturevalue("bucket")(request.param) as url:
            yield Store(f"{url}/{uuid.uuid4().hex}/run")


def test_a_flipped_bit_in_a_table_is_noticed(tmp_path):
    store = Store(str(tmp_path))
    table = pa.table({"n": pa.array(range(500)), "x": pa.array([i / 7 for i in range(500)])})
    store.write_table("t.parquet", table)
    data = (tmp_path / "t.parquet").read_bytes()
    noticed = 0
    for at in range(4, len(data), 41):
        (tmp_path / "t.parquet").write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        try:
            assert store.read_table("t.parquet").equals(table)
        except StrideError:
            noticed += 1
    assert noticed > 20


def test_a_flipped_bit_in_a_footer_is_noticed_and_never_reaches_the_library(tmp_path):
    store = Store(str(tmp_path))
    store.write_table("t.parquet", TABLE.slice(0, 50))
    data = (tmp_path / "t.parquet").read_bytes()
    assert pq.read_table(tmp_path / "t.parquet").equals(TABLE.slice(0, 50))  # other readers skip the checksum
    for at in range(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data)):
        (tmp_path / "t.parquet").write_bytes(data[:at] + bytes([data[at] ^ 8]) + data[at + 1 :])
        with pytest.raises(StrideError, match=r"t\.parquet cannot be read"):
            store.read_table("t.parquet")
    with pq.ParquetWriter(tmp_path / "whole.parquet", TABLE.schema) as writer:
        writer.write_table(TABLE)
    bare = (tmp_path / "whole.parquet").read_bytes()
    seal(str(tmp_path / "whole.parquet"))
    assert store.read_table("whole.parquet").equals(TABLE)
    (tmp_path / "whole.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-20] + bare[-21:-1] * 2)
    with pytest.raises(StrideError, match="cannot be read"):
        store.read_table("whole.parquet")


def test_a_flipped_bit_in_tensors_is_noticed(tmp_path):
    store = Store(str(tmp_path))
    tensors = {"a": torch.randn(3, 2), "b": torch.tensor(True), "c": torch.zeros(0), "d": torch.ones(2).bfloat16()}
    data = tensor_bytes(tensors)
    store.write("t.safetensors", data)
    assert {name: x.tolist() for name, x in store.read_tensors("t.safetensors").items()} == {
        name: x.tolist() for name, x in tensors.items()
    }
    for at in range(len(data)):
        store.write("t.safetensors", data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with contextlib.suppress(StrideError):  # a space in the header may be another white space
            assert store.read_tensors("t.safetensors").keys() == tensors.keys()
            assert all(torch.equal(x, tensors[name]) for name, x in store.read_tensors("t.safetensors").items())
    store.write("t.safetensors", save({"a": torch.ones(1)}))
    with pytest.raises(StrideError, match=r"its checksum differs; restore it, or delete its folder .* and rerun"):
        store.read_tensors("t.safetensors")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"a": 1, "b": [2]}', "has no checksum: another version of stride_ray wrote it, or it was edited"),
        ('{"a": 2, "b": [2], "checksum": "CHECKSUM"}', "was damaged or edited: its checksum differs"),
        ('{"A": 1, "b": [2], "checksum": "CHECKSUM"}', "was damaged or edited: its checksum differs"),
        ('{"a": 1, "b": [2], "c": 0, "checksum": "CHECKSUM"}', "was damaged or edited: its checksum differs"),
        ('{"a": 1, "b": [2], "checksum": ["CHECKSUM"]}', "was damaged or edited: its checksum differs"),
        ('[{"a": 1}]', "does not hold a JSON object"),
        ("null", "does not hold a JSON object"),
        ("{", "is not valid JSON: Expecting property name"),
        ("", "is not valid JSON: Expecting value"),
        ("[" * 100_000, "is not valid JSON"),
        ("\ud800", "is not valid JSON"),
        ('{"b": [2],\n\n "a": 1, "checksum": "CHECKSUM"}', ""),  # the same in another order and form
    ],
)
def test_a_record_that_is_not_as_it_was_written_is_refused_in_a_sentence(tmp_path, text, told):
    store = Store(str(tmp_path / "run"))
    store.write_json("stage/manifest.json", {"a": 1, "b": (2,)})
    written = store.read("stage/manifest.json").decode()
    checksum = json.loads(written)["checksum"]
    text = text.replace("CHECKSUM", checksum)
    store.write("stage/manifest.json", text.encode("utf-8", "surrogatepass"))
    for read in (store.read_json, lambda name: store.read_jsons([name])[0]):
        if not told:
            assert read("stage/manifest.json") == {"a": 1, "b": [2]}
            continue
        with pytest.raises(StrideError) as caught:
            read("stage/manifest.json")
        place = f"{tmp_path}/run/stage"
        assert str(caught.value).startswith(f"{place}/manifest.json {told}")
        assert str(caught.value).endswith(
            f"; restore it, or delete its folder {place} and rerun the command that made it."
        )
        assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_by_the_extra_that_has_it():
    for url in ("gs://bucket/a", "simplecache::abfs://c@account/a"):  # whose packages tests do not install
        with pytest.raises(StrideError, match=r"needs a package .* pip install 'stride-ray\[(gcs|azure)\]'"):
            Store(url)


def test_what_is_written_is_read(store):
    assert not store.exists("a/b.json")
    assert store.names("a") == []
    store.write_json("a/b.json", {"x": [1, None]})
    store.write("a/c.bin", memoryview(b"123"))
    assert store.read_json("a/b.json") == {"x": [1, None]}
    assert store.names("a") == ["b.json", "c.bin"]
    assert store.names("a", ".json") == ["b.json"]
    assert store.read_jsons(["a/b.json"] * 1) == [{"x": [1, None]}]
    assert store.child("a").read("c.bin") == b"123"
    store.write("a/c.bin", b"4")
    assert store.read("a/c.bin") == b"4"
    store.remove("a")
    store.remove("a")
    assert not store.exists("a/b.json")


def test_many_records_come_in_the_order_asked(store):
    names = [f"{i}.json" for i in (3, 1, 2)]
    for name in names:
        store.write_json(name, {"name": name})
    assert [record["name"] for record in store.read_jsons(names)] == names


def test_the_same_table_gives_the_same_bytes(store):
    first = store.write_table("a.parquet", TABLE)
    again = pa.concat_tables([TABLE.slice(0, 17), TABLE.slice(17)])
    assert store.write_table("b.parquet", again) == first
    assert store.read("a.parquet") == store.read("b.parquet")
    assert store.read_table("a.parquet").equals(TABLE)
    assert store.read_table("a.parquet", ["n"]).column_names == ["n"]
    assert store.write_table("b.parquet", TABLE.slice(1)) != first
    with store.open_parquet("a.parquet") as file:
        assert [file.metadata.row_group(i).num_rows for i in range(3)] == [4096, 4096, 10_000 - 2 * 4096]


def test_errors_are_sentences(store):
    with pytest.raises(StrideError, match=r"Cannot read .*nowhere\.json: no such file"):
        store.read_json("nowhere.json")
    with pytest.raises(StrideError, match="no such file"):
        store.read_table("nowhere.parquet")
    store.write("bad.json", b"{")
    store.write("bad.parquet", b"PAR1 and no more")
    store.write("bad.toml", b"\xff")
    for read, name, told in (
        (store.read_json, "bad.json", "is not valid JSON"),
        (store.read_table, "bad.parquet", "cannot be read as Parquet"),
        (store.read_text, "bad.toml", "is not UTF-8 text"),
    ):
        with pytest.raises(StrideError, match=told) as caught:
            read(name)
        assert store.display_url(name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_errors_of_the_file_system_are_sentences(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StrideError, match=r"Cannot write .*file/a/x"):
        Store(str(tmp_path / "file/a")).write("x", b"")
    with pytest.raises(StrideError, match="nosuch://bucket/run is not a path or URL that can be opened"):
        Store("nosuch://user:secret@bucket/run")


KILLED = """
import os, sys
from stride_ray.runtime.storage import Store, seal, tensor_bytes

os.{stop} = lambda *_: os.kill(os.getpid(), 9)
Store(sys.argv[1]).write("part.bin", b"new")
"""


@pytest.mark.parametrize("stop", ["fsync", "replace"])
@pytest.mark.parametrize("before", [None, b"old"])
def test_a_kill_in_the_middle_of_a_write_leaves_nothing_to_read(tmp_path, stop, before):
    store = Store(str(tmp_path / "run"))
    if before:
        store.write("part.bin", before)
    killed = subprocess.run([sys.executable, "-c", KILLED.format(stop=stop), store.url], timeout=60)
    assert killed.returncode == -9
    assert any(name.endswith(".partial") for name in os.listdir(store.root))
    assert store.names() == (["part.bin"] if before else [])
    assert store.exists("part.bin") == bool(before)
    if before:
        assert store.read("part.bin") == before
    store.write("part.bin", b"new")
    assert store.read("part.bin") == b"new"


def test_a_write_that_fails_cleans_up(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    (tmp_path / "part.bin").mkdir()
    (tmp_path / "part.bin/x").touch()
    with pytest.raises(StrideError, match=r"Cannot write .*part\.bin"):
        store.write("part.bin", b"new")
    assert os.listdir(tmp_path) == ["part.bin"]


def test_messages_hold_no_secrets():
    assert redact_url("s3://key:secret@bucket/run?token=1") == "s3://bucket/run"
    assert redact_url("/tmp/a b?c") == "/tmp/a b?c"


def test_a_store_travels():
    store = Store("memory://travels/run/")
    assert pickle.loads(pickle.dumps(store)).display_url("x") == "memory://travels/run/x"


def test_a_local_folder_stays_where_it_is_in_another_working_directory(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps((Store("mine"), claim(Store("claimed"), "blocks", {})))
    monkeypatch.chdir(tmp_path / "elsewhere")
    store, stage = pickle.loads(sent)
    store.write("a.txt", b"a")
    stage.store.child("deep").write("b.txt", b"b")
    assert (tmp_path / "mine/a.txt").exists()
    assert (tmp_path / "claimed/deep/b.txt").exists()
    assert not list((tmp_path / "elsewhere").iterdir())


def client_error(code, status):
    return botocore.exceptions.ClientError(
        {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject"
    )


def named(name, module, base=Exception, **facts):
    """An exception as a library that is not installed raises it."""
    return type(name, (base,), {"__module__": module, **facts})("some words")


def web_error(status):
    return named("ClientResponseError", "aiohttp.client_exceptions", status=status)


def raised_from(error, inner):
    error.__cause__ = inner
    return error


class AzureStore(MemoryFileSystem):
    """Answers as adlfs does where the store refuses: exists() with yes, info() with the refusal."""

    protocol, cachable, refusal = ("abfs", "az"), False, None

    def exists(self, path, **kwargs):
        return True

    def info(self, path, **kwargs):
        if self.refusal:
            raise self.refusal
        return super().info(path, **kwargs)


def test_what_an_azure_store_refuses_to_say_is_no_yes(tmp_path):
    store = Store(str(tmp_path))
    store.fs, store.local = AzureStore(), False
    assert not store.exists("a.json")
    store.write("a.json", b"{}")
    assert store.exists("a.json")
    AzureStore.refusal = named("ResourceExistsError", "azure.core.exceptions", error_code="ContainerBeingDeleted")
    with pytest.raises(StrideError, match=r"Cannot read .*a\.json: .*it is being deleted"):
        store.exists("a.json")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (client_error("NoSuchBucket", 404), "no such bucket"),
        (raised_from(FileNotFoundError("words"), client_error("NoSuchBucket", 404)), "no such bucket"),
        (raised_from(PermissionError("Forbidden"), client_error("403", 403)), "access denied"),
        (client_error("SignatureDoesNotMatch", 403), "credentials are not accepted"),
        (client_error("ExpiredToken", 400), "credentials have expired"),
        (client_error("SlowDown", 503), "the store throttles requests"),
        (botocore.exceptions.NoCredentialsError(), "no credentials"),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"), "the connection failed"),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"), "timed out"),
        (raised_from(OSError("Could not connect"), socket.gaierror(-2, "unknown")), "no host of that name is found"),
        (web_error(401), "credentials are not accepted"),
        (raised_from(FileNotFoundError("http://x"), web_error(403)), "access denied"),
        (raised_from(FileNotFoundError("http://x"), web_error(404)), "there is no such file"),
        (web_error(503), "the store fails"),
        (asyncio.TimeoutError(), "timed out"),
        (named("FSTimeoutError", "fsspec.exceptions", asyncio.TimeoutError), "timed out"),
        (named("DefaultCredentialsError", "google.auth.exceptions"), "no credentials"),
        (named("HttpError", "gcsfs.retry", code=403), "access denied"),
        (named("HttpResponseError", "azure.core.exceptions", error_code="ContainerNotFound"), "no such bucket"),
        (named("ClientAuthenticationError", "azure.core.exceptions"), "credentials are not accepted"),
        (named("ServiceRequestError", "azure.core.exceptions"), "the connection failed"),
        (OSError("Forbidden: b/bucket/o\nsome words"), "access denied"),  # gcsfs
        (ValueError("Bad Request: b/bucket/o\nsome words"), "the store does not understand the request"),  # gcsfs
        (
            raised_from(
                named("ClientAuthenticationError", "azure.core.exceptions", error_code="AuthenticationFailed"),
                named("HttpResponseError", "azure.core.exceptions", status_code=403),
            ),
            "credentials are not accepted",
        ),
        (
            named("ResourceExistsError", "azure.core.exceptions", error_code="LeaseIdMissing"),
            "another program holds it",
        ),
        (
            named("ResourceExistsError", "azure.core.exceptions", error_code="ContainerBeingDeleted"),
            "it is being deleted",
        ),
        (
            raised_from(
                named("HttpResponseError", "azure.core.exceptions", error_code="ServerBusy", status_code=503),
                named("HttpResponseError", "azure.core.exceptions", status_code=503),
            ),
            "the store throttles requests",
        ),
        (client_error("InvalidObjectState", 403), "it is archived and must be restored first"),
    ],
)
def test_the_fault_of_a_store_is_named(error, reason, tmp_path):
    assert storage_reason(error) == reason
    assert is_storage_error(error)
    with pytest.raises(StrideError) as told, Store(str(tmp_path)).translated_errors("x", "read"):
        raise error
    wanted = "no such file" if reason == "there is no such file" else f"Cannot read {tmp_path}/x: {reason}"
    assert wanted in str(told.value)
    table = Store(str(tmp_path))
    table.write_table("t.parquet", TABLE)
    with pytest.raises(StrideError) as told, table.open_parquet("t.parquet"):
        raise error
    assert "Parquet" not in str(told.value)


class Refusing(servers._Serving):
    """A store that answers every request with one status and code, as Google's and Azure's do."""

    def __init__(self, status, code):
        self.status, self.code = status, code

    def handler(self):
        owner = self

        class Handler(servers.QuietHandler):
            def do_GET(self):  # noqa: N802
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                reason = {"code": owner.status, "message": f"words {owner.code}"}
                xml = f"<Error><Code>{owner.code}</Code><Message>Some words.</Message></Error>"
                body = xml if self.path.startswith("/acc") else json.dumps({"error": reason})
                self.send_response(owner.status)
                self.send_header("x-ms-error-code", owner.code)
                self.send_header("Content-Type", "application/xml" if body is xml else "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body.encode())

        for verb in ("HEAD", "PUT", "POST"):
            setattr(Handler, f"do_{verb}", Handler.do_GET)
        return Handler


@pytest.mark.parametrize(
    ("scheme", "status", "code", "reading", "writing"),
    [
        ("gs", 401, "authError", "credentials are not accepted", "credentials are not accepted"),
        ("gs", 403, "forbidden", "access denied", "access denied"),
        ("gs", 404, "notFound", "no such file or folder", "no such bucket"),
        ("abfs", 403, "AuthorizationFailure", "access denied", "access denied"),
        ("abfs", 403, "AuthenticationFailed", "credentials are not accepted", "credentials are not accepted"),
        ("abfs", 404, "ContainerNotFound", "no such bucket", "no such bucket"),
        ("abfs", 404, "BlobNotFound", "no such file or folder", "no such bucket"),
        ("abfs", 409, "ContainerBeingDeleted", "it is being deleted", "it is being deleted"),
        ("abfs", 409, "LeaseIdMissing", "another program holds it", "another program holds it"),
    ],
)
def test_what_google_and_azure_refuse_is_named(scheme, status, code, reading, writing, monkeypatch, caplog):
    pytest.importorskip({"gs": "gcsfs", "abfs": "adlfs"}[scheme])
    fsspec.get_filesystem_class(scheme).clear_instance_cache()
    with Refusing(status, code) as server:
        place = f"http://127.0.0.1:{server.port}"
        account = f"DefaultEndpointsProtocol=http;AccountName=acc;AccountKey={'a2V5' * 8};BlobEndpoint={place}/acc;"
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", place)
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", account)
        url = f"{scheme}://{uuid.uuid4().hex}/run"  # a new one, for file systems are cached
        store = Store(url)
        for deed, told in (
            (lambda: store.read("a.json"), reading),
            (lambda: store.write("a.json", b"{}"), writing),
            (lambda: store.read_table("a.parquet"), reading if status != 404 else "no such file or folder"),
        ):
            with pytest.raises(StrideError, match=told) as caught:
                deed()
            assert "\n" not in str(caught.value)
        with pytest.raises(StrideError, match=reading if status != 404 else "does not exist"):
            plan([url], 100)
    assert not [record for record in caplog.records if record.exc_info]  # no traceback is logged


def test_bugs_are_not_faults_of_a_store(tmp_path):
    for error in (ValueError("words"), KeyError("words"), RuntimeError("words")):
        assert not is_storage_error(error)
        with pytest.raises(type(error)), Store(str(tmp_path)).translated_errors("x", "read"):
            raise error


@pytest.mark.parametrize(
    ("status", "reason"), [(401, "credentials are not accepted"), (403, "access denied"), (500, "the store fails")]
)
def test_a_web_server_that_refuses_is_not_a_file_that_is_missing(status, reason, tmp_path):
    with servers.SecretFiles(tmp_path) as server:
        server.status = status
        place = f"http://127.0.0.1:{server.port}/a.jsonl"
        with pytest.raises(StrideError, match=reason):
            plan([place], 100)
        with pytest.raises(StrideError, match=reason):
            Store(place.rpartition("/")[0]).read("a.jsonl")
        server.status = 404
        with pytest.raises(StrideError, match="does not exist"):
            plan([place], 100)
    with pytest.raises(StrideError, match="the connection failed"):
        plan([f"http://127.0.0.1:{servers.free_port()}/a.jsonl"], 100)
