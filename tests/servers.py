"""Real S3 servers on loopback for the tests, and a proxy in front of them that misbehaves on demand.

Swift (Debian's packages, with memcached) is a whole object store whose S3 API checks signatures and refuses conditional
writes; rclone serves a folder; moto alone knows conditional writes, and checks nothing.
"""

import base64
import contextlib
import email.utils
import http.client
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import parse_qs

KEY, SECRET, BUCKET = "test:tester", "testing1234567890", "bucket"
_SWIFT = ("swift-proxy-server", "swift-account-server", "swift-container-server", "swift-object-server", "memcached")
_STORAGE = """[DEFAULT]
{common}
bind_port = {port}
devices = {root}/devices
mount_check = false
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
_PROXY = """[DEFAULT]
{common}
bind_port = {port}
[pipeline:main]
pipeline = catch_errors cache s3api tempauth slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcached}
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_{user} = {secret} .admin
[filter:slo]
use = egg:swift#slo
"""


def environment(port):
    """What the usual S3 clients read: where the server is, and who asks."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        # rclone understands no trailing checksums
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@contextlib.contextmanager
def swift(root):
    """OpenStack Swift's S3 API, its four servers and memcached; yields its port, or None where it is not installed."""
    if any(shutil.which(name) is None for name in _SWIFT):
        yield None
        return
    (root / "devices/d1").mkdir(parents=True)
    ports = {kind: free_port() for kind in ("proxy", "account", "container", "object", "memcached")}
    common = f"swift_dir = {root}\nuser = {_user()}\nbind_ip = 127.0.0.1\nlog_address = /none\nworkers = 0"
    for kind in ("account", "container", "object"):
        builder = ["swift-ring-builder", str(root / f"{kind}.builder")]
        for step in (["create", "6", "1", "1"], ["add", f"r1z1-127.0.0.1:{ports[kind]}/d1", "1"], ["rebalance"]):
            subprocess.run([*builder, *step], check=True, stdout=subprocess.DEVNULL)
        text = _STORAGE.format(common=common, port=ports[kind], root=root, kind=kind)
        (root / f"{kind}.conf").write_text(text)
    told = {"common": common, "port": ports["proxy"], "memcached": ports["memcached"]}
    (root / "proxy.conf").write_text(_PROXY.format(**told, user=KEY.replace(":", "_"), secret=SECRET))
    cache = ["memcached", "-l", "127.0.0.1", "-p", str(ports["memcached"]), "-u", _user()]
    commands = [cache, *([f"swift-{kind}-server", str(root / f"{kind}.conf")] for kind in ports if kind != "memcached")]
    # As sites do, behind a proxy: eventlet answers a HEAD that fails with a body, which clients stumble over.
    with _running(commands, root / "log", list(ports.values())), FaultProxy(ports["proxy"]) as front:
        yield front.port


@contextlib.contextmanager
def rclone(root):
    """rclone's S3 server on a folder; yields its port."""
    port, program = free_port(), os.path.join(os.path.dirname(sys.executable), "rclone")
    (root / "served").mkdir(parents=True)
    command = [program, "serve", "s3", str(root / "served"), "--addr", f"127.0.0.1:{port}"]
    command += ["--auth-key", f"{KEY},{SECRET}", "--vfs-cache-mode", "off", "--config", ""]
    with _running([command], root / "log", [port]):
        yield port


@contextlib.contextmanager
def moto(root):
    """moto's S3, in memory; yields its port."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    root.mkdir(parents=True, exist_ok=True)
    with _running([command], root / "log", [port]):
        yield port


def _user():
    return subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def _running(commands, log, ports, limit=60):
    """Processes for the length of the block, once all their ports answer."""
    with open(log, "ab") as file:
        started = [subprocess.Popen(each, stdout=file, stderr=file) for each in commands]
    try:
        until = time.monotonic() + limit
        for port in ports:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=5).close()
                    break
                except OSError:
                    dead = [each.args[0] for each in started if each.poll() is not None]
                    if dead or time.monotonic() > until:
                        raise AssertionError(f"{dead or port}: {log.read_text()[-3000:]}") from None
                    time.sleep(0.05)
        yield
    finally:
        for each in started:
            each.kill()
            each.wait()


class _Serving:
    """A web server in a thread for the length of a ``with`` block; ``port`` is where it listens."""

    def handler(self):
        """The class that answers requests."""
        raise NotImplementedError

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class FaultProxy(_Serving):
    """An HTTP proxy before a server, for the length of a ``with`` block; its attributes say what goes wrong.

    Attributes:
        port: where it listens.
        refuses: of a request's number, whether it is answered 503 SlowDown.
        cuts: of a PUT's number, whether half its body is passed on and then both connections break.
        lag: seconds that a listing stays as it was.
        counts: what happened, by "refused", "cut" and "lagged".
    """

    def __init__(self, upstream):
        self.upstream, self.lag = upstream, 0.0
        self.refuses = self.cuts = lambda number: False
        self.counts = {"refused": 0, "cut": 0, "lagged": 0}
        self.lock, self.listings, self.numbers = threading.Lock(), {}, {"refused": 0, "cut": 0}

    def handler(self):
        return type("Handler", (_Forward,), {"owner": self})

    def takes(self, what):
        """Whether a fault of a kind is due."""
        with self.lock:
            due = {"refused": self.refuses, "cut": self.cuts}[what](self.numbers[what])
            self.numbers[what] += 1
            self.counts[what] += due
            return due


class QuietHandler(BaseHTTPRequestHandler):
    """A handler that keeps connections open and logs nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass


class _Forward(QuietHandler):
    owner: FaultProxy

    def _serve(self):
        owner = self.owner
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if owner.takes("refused"):
            told = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
            self._answer(503, {"Content-Type": "application/xml"}, told)
            return
        if self.command == "PUT" and len(body) > 1 and owner.takes("cut"):
            with socket.create_connection(("127.0.0.1", owner.upstream)) as half:
                head = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items() if name != "Expect")
                half.sendall(f"PUT {self.path} HTTP/1.1\r\n{head}\r\n".encode() + body[: len(body) // 2])
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        listing = self.command == "GET" and "list-type=2" in self.path
        if listing and owner.lag:
            kept = owner.listings.get(self.path)
            if kept and time.monotonic() - kept[0] < owner.lag:
                owner.counts["lagged"] += 1
                self._answer(*kept[1])
                return
        upstream = http.client.HTTPConnection("127.0.0.1", owner.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name != "Expect"}
        upstream.request(self.command, self.path, body, headers)
        response = upstream.getresponse()
        answer = (response.status, dict(response.getheaders()), response.read())
        upstream.close()
        if listing:
            owner.listings[self.path] = (time.monotonic(), answer)
        self._answer(*answer)

    def _answer(self, status, headers, body):
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body)


class SecretFiles(_Serving):
    """A web server of a folder for those who know a secret, for the length of a ``with`` block.

    A file is given to a request with the user and password, or with ``?sig=`` and the signature, that this has.

    Attributes:
        port: where it listens.
        status: what all requests are answered with, if it is set.
    """

    def __init__(self, root, user="me", password="sesame-open", signature="sesame-signed"):
        self.root, self.signature, self.status = root, signature, 0
        self.authorization = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    def handler(self):
        owner = self

        class Handler(QuietHandler):
            def do_GET(self):
                path, _, query = self.path.partition("?")
                known = query == f"sig={owner.signature}" or self.headers.get("Authorization") == owner.authorization
                file = owner.root / path.lstrip("/")
                status = owner.status or (403 if not known else 200 if file.is_file() else 404)
                body = file.read_bytes() if status == 200 else b""
                if (asked := self.headers.get("Range")) and status == 200:
                    first, last = asked.removeprefix("bytes=").split("-")
                    part = body[int(first) : int(last) + 1 if last else len(body)]
                    self.send_response_only(206)
                    self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(body)}")
                    body = part
                else:
                    self.send_response_only(status)
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("ETag", '"1"')
                self.send_header("Content-Type", "application/octet-stream")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_HEAD(self):
                self.do_GET()

        return Handler


for verb in ("GET", "PUT", "POST", "DELETE", "HEAD"):
    setattr(_Forward, f"do_{verb}", _Forward._serve)


class ObjectStore(_Serving):
    """A small S3 in memory with conditional writes and a clock of its own, for the length of a ``with`` block.

    It takes any credentials and knows PUT, GET, HEAD, DELETE of an object and a listing by prefix.

    Attributes:
        port: where it listens.
        answers: statuses that the next conditional PUTs are answered with, without effect; 200: done as asked.
        always: status that every conditional PUT is answered with after those; 200: done as asked.
        ignores: whether conditions are overlooked.
        ahead: seconds that the store's clock is before the machine's.
        objects: path to (content, ETag, seconds of the store's clock).
        puts: the conditions of the PUTs, "none", "If-None-Match" or "If-Match".
    """

    def __init__(self):
        self.answers, self.always, self.ignores, self.ahead = [], 200, False, 0.0
        self.objects, self.puts, self.lock = {}, [], threading.Lock()

    def handler(self):
        return type("Handler", (_Objects,), {"owner": self})

    def age(self, path, seconds):
        """Let an object be older."""
        content, tag, written = self.objects[path]
        self.objects[path] = (content, tag, written - seconds)


class _Objects(QuietHandler):
    owner: ObjectStore
    CODES: ClassVar = {
        404: "NoSuchKey",
        409: "ConditionalRequestConflict",
        412: "PreconditionFailed",
        501: "NotImplemented",
        403: "AccessDenied",
        503: "SlowDown",
    }

    def do_PUT(self):
        owner, path = self.owner, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            body = body.split(b"\r\n")[1]
        with owner.lock:
            held = owner.objects.get(path)
            given = [name for name in ("If-None-Match", "If-Match") if name in self.headers]
            owner.puts.append((given or ["none"])[0])
            status = 200
            if given and not owner.ignores:
                status = owner.answers.pop(0) if owner.answers else owner.always
                met = held is None if given == ["If-None-Match"] else held and held[1] == self.headers["If-Match"]
                status = 412 if status == 200 and not met else status
            if status == 200:
                tag = f'"{uuid.uuid4().hex}"'
                owner.objects[path] = (body, tag, time.time() + owner.ahead)
        self._reply(status, b"", {"ETag": owner.objects[path][1]} if status == 200 else {})

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if "list-type" in query:
            prefix = path.rstrip("/") + "/" + parse_qs(query).get("prefix", [""])[0]
            keys = [key for key in self.owner.objects if key.startswith(prefix)]
            rows = "".join(
                f"<Contents><Key>{key.split('/', 2)[2]}</Key><Size>{len(self.owner.objects[key][0])}</Size></Contents>"
                for key in keys
            )
            self._reply(200, f"<ListBucketResult><KeyCount>{len(keys)}</KeyCount>{rows}</ListBucketResult>".encode())
            return
        held = self.owner.objects.get(path)
        if held is None:
            self._reply(404)
            return
        when = email.utils.formatdate(int(held[2]), usegmt=True)
        self._reply(200, held[0], {"ETag": held[1], "Last-Modified": when})

    def do_HEAD(self):
        self.do_GET()

    def do_DELETE(self):
        self.owner.objects.pop(self.path.partition("?")[0], None)
        self._reply(204)

    def _reply(self, status, body=b"", headers=None):
        if status in self.CODES:
            body = f"<Error><Code>{self.CODES[status]}</Code><Message>as the test asks</Message></Error>".encode()
        self.send_response_only(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Date", email.utils.formatdate(time.time() + self.owner.ahead, usegmt=True))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
