"""Nights of scans: what is done anew, what is new and resolved, exit statuses, killed scans, webhooks, comparisons."""

import contextlib
import http.server
import json
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import killed_at_write, run_plainly, write_lines

from stride_ray.cli.main import main
from stride_ray.contamination import nightly, webhook
from stride_ray.contamination.compare import compare, describe
from stride_ray.contamination.items import read_set
from stride_ray.contamination.nightly import scan
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run
from stride_ray.runtime.storage import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))

NAMES = "amber birch cedar delta ember fjord grove heath islet jetty knoll larch marsh niche oasis prairie".split()


def question(i):
    """Text of 20 words that no other one shares six of in a row."""
    return " ".join(f"{NAMES[(i + j) % 16]}{i * j % 23}" for j in range(20)) + "?"


ITEMS = [{"id": f"i{i}", "question": question(i), "answer": f"answer {i}"} for i in range(6)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A corpus of three files, a set of items and a run for the lexical channel alone, without Ray."""
    run_plainly(monkeypatch)
    corpus = tmp_path / "corpus"
    for name in "abc":
        write_lines(corpus / f"{name}.jsonl", [{"text": f"document {name} {i} <b>of no account</b>"} for i in range(4)])
    write_lines(tmp_path / "items.jsonl", ITEMS)
    return tmp_path


def night(place, name="", items="items.jsonl", webhook="", **options):
    changes = {"corpus.input": str(place / "corpus"), "scan.influence": False}
    run = Run(str(place / "run"), changes=changes | options)
    return scan(run, [read_set(str(place / items), "items")], str(place / "scans"), (), name, webhook)


def leak(place, i, name="new.jsonl"):
    write_lines(place / "corpus" / name, [{"text": f"see: {question(i)} <script>x</script>"}])


def data(folder):
    kept = ("verdicts.parquet", "matches.parquet", "report.md", "report.html")
    return {name: (Path(folder) / name).read_bytes() for name in kept}


def test_the_second_night_names_exactly_the_one_new_leak_and_reads_what_is_new(place):
    first = night(place, "n1")
    assert (first["status"], first["new"], first["did"]["searched_units"]) == (0, 0, 3)
    leak(place, 3)
    second = night(place, "n2")
    assert (second["status"], second["new"], second["before"]) == (2, 1, "n1")
    assert second["did"] == {"searched_units": 1, "searched_items": 6, "asked_items": 0}
    report = (place / "scans/nights/n2/report.md").read_text()
    assert [i for i in range(6) if f"items / i{i}:" in report] == [3]
    assert "100% in 1 document(s), first new.jsonl#0" in report
    third = night(place, "n3")
    assert (third["status"], third["new"], third["resolved"]) == (0, 0, 0)
    assert third["did"] == {"searched_units": 0, "searched_items": 0, "asked_items": 0}
    assert third["seconds"] < 5
    (place / "corpus/new.jsonl").unlink()
    fourth = night(place, "n4")
    assert (fourth["status"], fourth["new"], fourth["resolved"]) == (0, 0, 1)
    assert "Resolved" in (place / "scans/nights/n4/report.md").read_text()
    page = (place / "scans/nights/n4/report.html").read_text()
    assert '{"nights":["n1","n2","n3","n4"],"sets":[{"name":"items","lexical":[0,1,1,0],' in page


def test_earlier_nights_are_followed_back_whatever_their_names(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    for before, name in (("gone", "b"), ("b", "c"), ("c", "a")):
        store.write_json(f"nights/{name}/manifest.json", {"night": name, "before": before})
    (tmp_path / "nights/half").mkdir()
    names = [each["night"] for each in nightly.earlier_nights(store, "a")]
    assert names == ["b", "c", "a"]
    monkeypatch.setattr(nightly, "NIGHTS", 3)
    assert [each["night"] for each in nightly.earlier_nights(store, "a")] == ["c", "a"]
    assert nightly.earlier_nights(store, "") == []


def test_new_items_meet_all_units_and_changed_files_are_read_again(place):
    leak(place, 7, "a2.jsonl")
    night(place, "n1")
    write_lines(place / "more.jsonl", [*ITEMS, {"id": "i7", "question": question(7), "answer": "seven"}])
    second = night(place, "n2", "more.jsonl")
    assert second["did"]["searched_units"] == 4
    assert second["did"]["searched_items"] == 1
    assert (second["status"], second["new"]) == (2, 1)
    write_lines(place / "corpus/a2.jsonl", [{"text": "nothing of the kind any more"}])
    third = night(place, "n3", "more.jsonl")
    assert third["did"] == {"searched_units": 1, "searched_items": 7, "asked_items": 0}
    assert third["resolved"] == 1
    # An item that is not evaluated any more is resolved too, and said to be gone.
    leak(place, 3)
    night(place, "n4", "more.jsonl")
    write_lines(place / "fewer.jsonl", ITEMS[:2])
    found = night(place, "n5", "fewer.jsonl")
    assert found["resolved"] == 1
    assert "the item is no longer evaluated" in (place / "scans/nights/n5/report.md").read_text()


def test_small_text_files_stay_in_their_units(place):
    for i in range(3):
        (place / f"corpus/t{i}.txt").write_text(f"text number {i}")
    night(place, "n1")
    (place / "corpus/t00.txt").write_text(f"before: {question(2)}")  # sorted before the others
    second = night(place, "n2")
    assert second["did"]["searched_units"] == 1
    assert second["new"] == 1


@pytest.mark.parametrize("at", [1, 3, 5, 8, 10, 11])
def test_a_killed_scan_leaves_the_last_good_night_and_goes_on(at, place):
    night(place, "n1")
    before = data(place / "scans/nights/n1")
    leak(place, 1)
    shutil.copytree(place / "scans", place / "kept")
    with killed_at_write(at):
        night(place, "n2")
    assert Store(f"{place}/scans").read_json("latest.json") == {"night": "n1"}
    assert data(place / "scans/nights/n1") == before
    assert not (place / "scans/scan.lock").exists()
    if not (place / "scans/nights/n2/manifest.json").exists():
        assert night(place, "n2")["status"] == 2
        resumed = data(place / "scans/nights/n2")
        shutil.rmtree(place / "scans")
        (place / "kept").rename(place / "scans")
        night(place, "n2")
        assert data(place / "scans/nights/n2") == resumed


def test_dates_are_names_and_a_finished_night_is_not_made_again(place):
    first, second = night(place), night(place)
    assert second["night"] == f"{first['night']}-2"
    with pytest.raises(StrideError, match="is finished; give another name"):
        night(place, first["night"])


class Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append(json.loads(body))
        self.send_response(self.server.answer)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hook():
    server = http.server.HTTPServer(("127.0.0.1", 0), Hook)
    server.got, server.answer = [], 204
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_webhook_is_told_and_its_failure_leaves_the_report(place, hook):
    url = f"http://127.0.0.1:{hook.server_port}/scan?token=secret"
    leak(place, 4)
    first = night(place, "n1", webhook=url)
    assert (first["status"], first["webhook"]) == (2, "")
    (got,) = hook.got
    assert (got["new"], got["status"], [f["item_id"] for f in got["findings"]]) == (1, 2, ["i4"])
    hook.answer = 500
    leak(place, 5, "another.jsonl")
    second = night(place, "n2", webhook=url)
    assert second["status"] == 1
    assert second["webhook"] == f"http://127.0.0.1:{hook.server_port}/… answered 500"
    assert (place / "scans/nights/n2/report.md").exists()
    assert Store(f"{place}/scans").read_json("latest.json") == {"night": "n2"}
    assert "n1" in second["before"]
    hook.shutdown()
    hook.server_close()
    third = night(place, "n3", webhook=url)
    assert third["status"] == 1
    assert "cannot be reached" in third["webhook"]
    assert "secret" not in third["webhook"]
    assert "is not an HTTP URL" in night(place, "n4", webhook="file:///etc/passwd")["webhook"]


@contextlib.contextmanager
def answering(*pieces, between=0.0):
    """A server that answers any request with these bytes; yields its URL and the requests."""
    server = socket.create_server(("127.0.0.1", 0))
    got = []

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection = server.accept()[0]
                with connection:
                    got.append(connection.recv(1 << 16))
                    for piece in pieces:
                        connection.sendall(piece)
                        time.sleep(between)

    threading.Thread(target=serve, daemon=True).start()
    with server:
        yield f"127.0.0.1:{server.getsockname()[1]}", got
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: /other\r\nContent-Length: 0\r\n\r\n", "answered 302 (a redirect; give"),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", "answered 304"),
        (b"SSH-2.0-OpenSSH_9\r\n", "cannot be reached (BadStatusLine"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", "cannot be reached (LineTooLong"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc", ""),  # it accepted the summary
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", ""),
    ],
)
def test_whatever_a_webhook_answers_is_a_clause(answer, told):
    with answering(answer) as (host, got):
        why = webhook.post(f"http://{host}/scan?token=secret", {})
    assert told in why
    assert bool(why) == bool(told)
    assert "secret" not in why
    assert len(got) == 1


def test_a_webhook_that_answers_for_ever_is_not_waited_for():
    started = time.monotonic()
    with answering(b"HTTP/1.1 200 OK\r\n\r\n", *[b"x"] * 50, between=0.1) as (host, _):
        assert webhook.post(f"http://{host}", {}) == ""
    assert time.monotonic() - started < 2


def test_a_webhooks_password_and_path_are_sent_as_browsers_do():
    with answering(b"HTTP/1.1 204 No Content\r\n\r\n") as (host, got):
        assert webhook.post(f"http://me:p%40ss@{host}/a b/\u00fc?c=d e%20f", {"a": 1}) == ""
    head, _, body = got[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /a%20b/%C3%BC?c=d%20e%20f HTTP")
    assert b"Authorization: Basic bWU6cEBzcw==" in head
    assert b"Host: " + host.encode() in head
    assert body in (b"", b'{"a": 1}')  # the body may come in a packet of its own


@pytest.mark.parametrize(
    "url",
    ["host/secret", "http:///secret", "http://[::1/secret", "http://h:port/secret", "mailto:secret", "ftp://h/secret"],
)
def test_what_is_no_url_of_a_webhook_is_told_as_that(url):
    why = webhook.post(url, {})
    assert "is not an HTTP URL, such as https://host/path" in why
    assert "secret" not in why


@pytest.mark.parametrize("name", ["../n", "a/b", ".n", "a\nb", "half \ud800"])
def test_names_that_are_no_folders_are_refused(name, place):
    with pytest.raises(StrideError, match="is not a valid name for a night; use letters"):
        night(place, name)


def test_nights_may_be_deleted(place):
    leak(place, 4)
    night(place, "n1")
    Path(place / "scans/nights/n1/verdicts.parquet").unlink()
    with pytest.raises(StrideError, match=r"n1 has no verdicts\.parquet; restore it, or delete the whole folder"):
        night(place, "n2")
    with pytest.raises(StrideError, match=r"n1 has no verdicts\.parquet; restore it, or compare another night"):
        compare(str(place / "scans/nights/n1"), str(place / "scans/nights/n1"))
    shutil.rmtree(place / "scans/nights/n1")
    again = night(place, "n2")
    assert (again["status"], again["new"], again["before"]) == (2, 1, "")
    assert night(place, "n3")["status"] == 0


def test_what_was_not_told_is_told_the_next_night(place, hook):
    url = f"http://127.0.0.1:{hook.server_port}/scan"
    night(place, "n1", webhook=url)
    hook.answer = 500
    leak(place, 4)
    assert (night(place, "n2", webhook=url)["status"], night(place, "n3", webhook=url)["new"]) == (1, 1)
    hook.answer = 204
    fourth = night(place, "n4", webhook=url)
    assert (fourth["status"], fourth["since"], fourth["before"]) == (2, "n1", "n3")
    assert [found["item_id"] for found in hook.got[-1]["findings"]] == ["i4"]
    assert "since n1" in (place / "scans/nights/n4/report.md").read_text()
    assert (night(place, "n5", webhook=url)["status"], hook.got[-1]["new"]) == (0, 0)


@pytest.mark.parametrize("last", ["manifest.json", "latest.json", "told.json"])
def test_a_night_that_was_killed_after_its_manifest_is_finished_and_told(place, monkeypatch, last):
    night(place, "n1")
    leak(place, 4)
    write = Store.write_json

    def killed(store, name, value):
        if name == f"nights/n2/{nightly.REPORTED}" or (name == "latest.json" and last == "manifest.json"):
            raise KeyboardInterrupt
        write(store, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            night(place, "n2")
    if last == "told.json":  # another name, as a rerun without --night has it
        assert (night(place, "n3")["status"], night(place, "n4")["status"]) == (2, 0)
        return
    before = data(place / "scans/nights/n2")
    again = night(place, "n2")
    assert (again["status"], again["new"], again["night"]) == (2, 1, "n2")
    assert data(place / "scans/nights/n2") == before
    assert Store(f"{place}/scans").read_json("latest.json") == {"night": "n2"}
    assert night(place, "n3")["status"] == 0
    with pytest.raises(StrideError, match="n2 is finished"):
        night(place, "n2")


def test_the_command_line_and_its_exit_statuses(place, capsys):
    leak(place, 2)
    (place / "sets").mkdir()
    shutil.copy(place / "items.jsonl", place / "sets")
    common = ["scan", str(place / "run"), "--out", str(place / "scans"), "--influence", "false"]
    common += ["--set", f"corpus.input={place / 'corpus'}"]
    assert main([*common, "--set-folder", str(place / "sets"), "--night", "n1"]) == 2
    assert "items: 6 items, 1 lexical, 0 influence, 0 both, 5 clean; 1 new" in capsys.readouterr().out
    assert main([*common, "--evaluation", f"items={place / 'items.jsonl'}", "--night", "n2"]) == 0
    assert "0 new finding(s)" in capsys.readouterr().out
    percent = [*common, "--overlap", "30", "--evaluation", f"items={place / 'items.jsonl'}", "--night", "n3"]
    assert main(percent) == 1
    assert "scan.overlap is 30; it must be a share" in capsys.readouterr().err
    assert main([*common, "--night", "n3"]) == 1
    assert "No evaluation set is given" in capsys.readouterr().err
    with pytest.raises(SystemExit) as bad:
        main(["scan", "--nonsense"])
    assert bad.value.code == 1
    nights = [str(place / f"scans/nights/n{i}") for i in (1, 2)]
    assert main(["scan", "compare", *nights]) == 0
    assert "Nothing is new" in capsys.readouterr().out
    leak(place, 1, "more.jsonl")
    assert main([*common, "--evaluation", str(place / "items.jsonl"), "--night", "n3"]) == 2
    assert main(["scan", "compare", nights[0], str(place / "scans/nights/n3")]) == 2
    assert "1 new\n  items / i1: lexical" in capsys.readouterr().out
    assert main(["scan", "compare", nights[0], str(place)]) == 1
    assert "is not a finished scan" in capsys.readouterr().err
    found = compare(str(place / "scans/nights/n3"), nights[0])
    assert describe(found).splitlines()[0] == "1 resolved"
    assert main([*common, "--evaluation", str(place / "items.jsonl"), "--fields", "question"]) == 1


def test_reports_show_text_as_text(place):
    rows = [{"id": "<img src=x onerror=alert(1)>|*b*", "question": f"<script>alert('{question(0)}')</script>"}]
    write_lines(place / "items.jsonl", rows)
    write_lines(place / "corpus/x.jsonl", [{"text": question(0)}])
    night(place, "n1")
    page = (place / "scans/nights/n1/report.html").read_text()
    assert page.count("<script") == 2  # the data and the page's own
    assert "<img" not in page
    assert "\\u003cscript\\u003ealert('amber0" in page
    text = (place / "scans/nights/n1/report.md").read_text()
    assert "<script" not in text
    assert "\\*b\\*" in text


def test_the_report_names_what_was_searched_and_what_was_not(place):
    row = {"id": "a", "url": "http://a.b/c", "question": "Was it so?", "essay": question(0), "topic": "an art"}
    row["choices"] = [[1]]
    write_lines(place / "items.jsonl", [row])
    write_lines(place / "corpus/x.jsonl", [{"text": "&nbsp;".join(question(0).split())}])
    (facts,) = night(place, "n1")["sets"]
    assert facts["verdicts"]["lexical"] == 1
    assert (facts["searched_fields"], facts["left_out_fields"]) == (["essay"], ["question", "topic", "url"])
    text = (place / "scans/nights/n1/report.md").read_text()
    assert "set items: searched for essay; not for question, topic, url (too short," in text
    assert "1 item(s) have a field that was not understood" in text
    assert "'choices' does not hold a list of texts" in text


def test_an_alarm_for_copies_only(place, monkeypatch):
    from stride_ray.contamination.compare import Difference

    found = Difference([{"verdict": "influence"}], [], [])
    for alarm, wanted in (("any", True), ("lexical", False)):
        assert nightly._alarming(Run(str(place / "run"), changes={"scan.alarm": alarm}), found) is wanted
    risen = Difference([], [], [{"verdict": "both", "before": "influence"}])
    assert nightly._alarming(Run(str(place / "run"), changes={"scan.alarm": "lexical"}), risen)
