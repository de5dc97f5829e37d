"""The HTTP interface and its page: with a real service behind them, and, at the end, on Ray Serve."""

import asyncio
import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import uvicorn
from conftest import HOSTILE, opened, run_plainly, settings
from ray import serve

from benchmarks.serving import replicas_of, running
from stride_ray.operators.fit import fit
from stride_ray.runtime.run import Run
from stride_ray.serve.api import BODY_BYTES, Limits, build_api
from stride_ray.serve.application import APPLICATION, QUIET, Options, build
from stride_ray.serve.service import InvalidQueryError, Service

PROMPT, ONE, OTHER = "the anchor met", " the tide and the gull", " a butter and an oven"
QUESTION = {"prompt": PROMPT, "completion": ONE, "blocks": 3}
TOKEN = "a token that nobody guesses"


@pytest.fixture(scope="module")
def run(parts, sharded):
    patch = pytest.MonkeyPatch()
    run_plainly(patch)
    try:
        more = {"operators__form": "sites", "solve__tokens": 64, "attribute__candidates": 12}
        found = Run(str(sharded("served")), changes=settings(parts, **more, compute__worker_gb=1.0))
        fit(found)
    finally:
        patch.undo()
    return found


@pytest.fixture(scope="module")
def service(run):
    return Service(run.url)


@contextlib.contextmanager
def listening(service, limits):
    """The interface before a service, without Ray; yields its address."""
    thread = ThreadPoolExecutor(1)

    def answer(request):
        try:
            return 200, service.answer(request)
        except InvalidQueryError as error:
            return 422, {"error": str(error)}

    async def handler(request):
        return await asyncio.get_running_loop().run_in_executor(thread, answer, request)

    server = uvicorn.Server(uvicorn.Config(build_api(limits, handler), port=0, log_level="critical"))
    running = threading.Thread(target=server.run, daemon=True)
    running.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        running.join()


@pytest.fixture(scope="module")
def url(service):
    with listening(service, Limits(candidates=50, blocks=10)) as found:
        yield found


def ask(url, body=None, path="attribute", seconds=120, **headers):
    """Status and JSON of an answer; GET without a body."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        body = error.read()
        return error.code, json.loads(body) if body.startswith(b"{") else body.decode()


def without_time(told):
    return {name: value for name, value in told.items() if name != "seconds"}


def test_an_answer_is_the_services(url, service):
    status, told = ask(url, QUESTION)
    assert status == 200
    expected = service.answer(QUESTION)
    assert without_time(told) == without_time(json.loads(json.dumps(expected)))
    assert told["run"]["blocks"] > 0
    assert len(told["helping"]) == 3


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({}, 422, r"There is no query: give a completion \(and its prompt\), a text, or messages\."),
        ({"prompt": "the"}, 422, "There is no query"),
        ({"prompt": "the", "completion": ""}, 422, "There is no query"),
        ({"prompt": "the", "completion": " \n"}, 422, "'completion' is empty"),
        ({"prompt": 5, "completion": "the"}, 422, "prompt: .*string"),
        ({"text": "the tide", "colour": 1}, 422, "There is no field 'colour'; the fields are text, prompt, "),
        (b'{"text": "the tide", "\\ud800": 1}', 422, "Input should be a valid string"),
        ({"text": "the tide", "blocks": 0}, 422, "blocks: .*greater than or equal to 1"),
        ({"text": "the tide", "blocks": 11}, 422, "blocks: at most 10 here"),
        ({"text": "the tide", "candidates": 51}, 422, "candidates: at most 50 here"),
        ({"text": "the tide", "matches": 11}, 422, "matches: at most 10 here"),
        ({"text": "the tide", "matches": -1}, 422, "matches: .*greater than or equal to 0"),
        ({"text": "the tide " * 300}, 422, "has .* tokens; the model's context is .*: shorten it"),
        ({"text": "the tide", "contrast": 7}, 422, "contrast: "),
        ({"text": "the tide", "contrast": " "}, 422, "contrast: is empty; leave it out"),
        (b'{"text": "the tide", "sources": ["\\ud800"]}', 422, "a lone surrogate"),
        ({"messages": [{"content": "x"}]}, 422, "'messages' holds a message"),
        (b"{", 422, "The body is not a JSON object with a query"),
        (b"[]", 422, "The body is not a JSON object with a query"),
        (b'"the tide"', 422, "The body is not a JSON object with a query"),
        (b'{"text": "the \\ud800 tide"}', 422, "lone surrogate"),
        (b'{"text": "\xff"}', 400, "error parsing the body"),
        (b" " * (BODY_BYTES + 1), 413, "The body has more than 1048576 bytes, larger than any model's context"),
    ],
)
def test_a_bad_request_is_told_so_in_a_sentence(url, body, status, says):
    found, told = ask(url, body)
    assert (found, list(told)) == (status, ["error"])
    assert re.search(says, told["error"]), told
    assert "Traceback" not in told["error"]


def test_a_hundred_megabytes_are_refused_and_not_held(url):
    connection = http.client.HTTPConnection(url.removeprefix("http://").strip("/"), timeout=60)
    before = psutil.Process().memory_info().rss
    pieces = (b"a" * 2**16 for _ in range(1600))  # without a length
    connection.request("POST", "/attribute", pieces, {"Content-Type": "application/json"}, encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413
    assert json.load(response)["error"].startswith("The body has more than 1048576 bytes")
    assert psutil.Process().memory_info().rss - before < 64 * 2**20
    assert ask(url, path="health")[0] == 200


def test_a_completion_needs_no_prompt_and_a_null_number_of_candidates_is_the_runs(url, service):
    status, body = ask(url, {"completion": "the tide and the gull", "candidates": None, "blocks": 3})
    assert (status, body["exact"]) == (200, service.attributor.candidates)


def test_what_a_page_elsewhere_can_send_is_refused(url):
    status, body = ask(url, json.dumps(QUESTION).encode(), **{"Content-Type": "text/plain"})
    assert (status, list(body)) == (422, ["error"])
    assert ask(url, json.dumps(QUESTION).encode(), Host="elsewhere.example")[0] == 400


def test_an_unexpected_failure_is_json_too():
    class Broken:
        def answer(self, request):
            raise MemoryError

    with listening(Broken(), Limits()) as url:
        assert ask(url, QUESTION) == (500, {"error": "The service failed on this request; its log says why."})


def test_what_is_not_there_and_who_may_ask(url):
    assert ask(url, path="nothing") == (404, {"error": "Not Found: GET '/nothing'"})
    assert ask(url, path="attribute")[0] == 405
    status, schema = ask(url, path="openapi.json")
    assert status == 200
    assert set(schema["components"]["schemas"]["AttributeRequest"]["properties"]) >= {
        "prompt",
        "completion",
        "contrast",
    }
    with urllib.request.urlopen(url + "docs") as page:
        assert "://" not in "".join(
            re.findall(r'(?:src|href)="([^"]*)"', page.read().decode())
        )  # works without a network


def test_a_token_is_asked_for(service, browser):
    with listening(service, Limits(token=TOKEN, loopback=False)) as url:
        for given in ({}, {"Authorization": "Bearer another"}, {"Authorization": TOKEN}, {"Authorization": "é"}):
            status, told = ask(url, QUESTION, **given)
            assert (status, told["error"][:25]) == (401, "Give the service's token,")
        assert ask(url, QUESTION, Authorization=f"Bearer {TOKEN}")[0] == 200
        assert ask(url, path="health")[0] == 200
        assert ask(url, path="openapi.json")[0] == 200
        # A path that is made of the Host header does not open what needs the token.
        assert ask(url, QUESTION, Host="x/health?")[0] in (400, 401)
        page, _ = opened(browser, url)
        page.fill("#completion", ONE)
        page.click("#ask")
        page.wait_for_selector("#state.wrong")
        assert page.inner_text("#state").startswith("Give the service's token")
        page.fill("#token", TOKEN)
        page.click("#ask")
        page.wait_for_selector("#answer .helping details")


@pytest.fixture
def page(browser, url):
    found, complaints = opened(browser, url)
    yield found
    assert not complaints


def asked(page, **fields):
    for name, value in fields.items():
        if name not in ("prompt", "completion"):
            page.evaluate("document.getElementById('more').open = true")
        page.fill(f"#{name}", value)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#answer .helping details")


def test_in_a_browser_one_types_asks_reads_and_filters(page, service):
    asked(page, prompt=PROMPT, completion=ONE)
    told = service.answer({"prompt": PROMPT, "completion": ONE, "blocks": 8})
    assert page.locator("#answer .sides .helping details").count() == len(told["helping"])
    nearest = page.locator("#answer .matches details")
    assert nearest.locator("pre").all_text_contents() == [row["text"] for row in told["matches"]]
    assert f"block {told['matches'][0]['ordinal']} · " in nearest.first.text_content()
    first = page.locator("#answer .sides .helping pre").first
    assert first.text_content() == told["helping"][0]["text"]
    largest = max(told["helping"][0]["tokens"], key=lambda token: abs(token[1]))[0]
    assert largest in first.locator("span").all_text_contents()
    assert page.inner_text("#answer pre").strip().startswith(PROMPT)
    assert page.locator("#answer tbody tr").count() == len(told["documents"])
    source = page.locator("#answer .share button").first.inner_text()
    page.locator("#answer .share button").first.click()
    page.wait_for_selector("#ask:not([disabled])")
    assert {each.text_content() for each in page.locator("#answer tbody td:nth-child(3)").all()} == {source}


def test_a_contrast_and_its_link(page, browser):
    asked(page, prompt=PROMPT, completion=ONE, contrast=OTHER)
    assert page.inner_text("#answer h2 >> nth=0") == "Why this rather than that"
    assert "rather than" in page.inner_text("#answer pre >> nth=0")
    told = page.inner_text("#answer .helping")
    again, complaints = opened(browser, page.url)
    again.wait_for_selector("#answer .helping details")
    assert again.inner_text("#answer .helping") == told
    assert not complaints


def test_a_saved_page_needs_no_service(page, browser, tmp_path):
    asked(page, prompt=PROMPT, completion=ONE)
    told = page.inner_text("#answer .helping")
    with page.expect_download() as download:
        page.click("text=Save as a page")
    download.value.save_as(tmp_path / "saved.html")
    saved, complaints = opened(browser, (tmp_path / "saved.html").as_uri())
    assert saved.inner_text("#answer .helping") == told
    assert saved.locator("form, button").count() == 0
    assert not complaints


def test_nothing_that_is_asked_or_answered_runs(page, browser, tmp_path, service):
    told = service.answer(QUESTION)
    for row in told["helping"]:
        row |= {"document_id": HOSTILE, "source": HOSTILE, "text": HOSTILE, "tokens": [[HOSTILE, 1.0]]}
    told |= {"query": [[HOSTILE, 1.0]], "contrast": [[HOSTILE, 1.0]], "sources": [[HOSTILE, 1.0]]}
    told["run"] = {"run": HOSTILE, "model": HOSTILE, "blocks": 1}
    page.route("**/attribute", lambda route: route.fulfill(json=told))
    asked(page, prompt=HOSTILE, completion=HOSTILE)
    assert page.locator("#answer .helping pre").first.text_content() == HOSTILE
    assert page.locator("#answer img, #answer script").count() == 0
    with page.expect_download() as download:
        page.click("text=Save as a page")
    download.value.save_as(tmp_path / "saved.html")
    saved, complaints = opened(browser, (tmp_path / "saved.html").as_uri())
    assert saved.locator("#answer .helping pre").first.text_content() == HOSTILE
    assert not complaints


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_accessible_and_fits_a_telephone(browser, url, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page, complaints = opened(browser, url, viewport={"width": 380, "height": 760}, color_scheme=scheme)
    asked(page, prompt=PROMPT, completion=ONE, contrast=OTHER)
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    assert not complaints
    page.evaluate("document.querySelector('meta[http-equiv]').remove()")
    serious = [
        (each["id"], [node["html"] for node in each["nodes"]][:3])
        for each in Axe().run(page).response["violations"]
        if each["impact"] in ("serious", "critical")
    ]
    assert not serious


@pytest.fixture(scope="module")
def deployed(run):
    """``stride-ray serve`` with two replicas and room for four requests that wait."""
    with running(run.url, 2, queue=4) as service:
        yield service


def patiently(url, question):
    """The answer of a client that comes back when it is told to."""
    for _ in range(60):
        status, told = ask(url, question)
        if status != 429:
            return status, told
        time.sleep(0.5)
    return status, told


def test_on_ray_serve_the_answer_is_the_same(deployed, service):
    status, told = ask(deployed.url, QUESTION)
    assert status == 200
    assert without_time(told) == without_time(json.loads(json.dumps(service.answer(QUESTION))))


def test_many_clients_wait_or_are_told_to_come_back(deployed):
    with ThreadPoolExecutor(40) as clients:
        found = list(clients.map(lambda _: ask(deployed.url, QUESTION), range(40)))
    statuses = [status for status, _ in found]
    assert set(statuses) == {200, 429}
    refused = next(told for status, told in found if status == 429)
    assert re.fullmatch(r"\d requests are waiting, the maximum; ask again in some seconds\.", refused["error"])
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(lambda _: patiently(deployed.url, QUESTION), range(8)))
    assert {status for status, _ in found} == {200}


def test_a_replica_that_dies_loses_no_answer(deployed):
    expected = without_time(ask(deployed.url, QUESTION)[1])
    victims = replicas_of(deployed.process)
    assert len(victims) == 2
    long = {**QUESTION, "candidates": 400}
    whole = without_time(ask(deployed.url, long)[1])
    with ThreadPoolExecutor(4) as clients:
        waiting = [clients.submit(ask, deployed.url, long) for _ in range(4)]
        time.sleep(0.2)
        assert not any(each.done() for each in waiting)  # two are under way
        victims[0].kill()
        found = [each.result() for each in waiting]
    assert [status for status, _ in found] == [200] * 4
    assert all(without_time(body) == whole for _, body in found)
    assert without_time(patiently(deployed.url, QUESTION)[1]) == expected


def test_a_client_that_hangs_up_disturbs_nobody(deployed, service):
    """Its request goes on in the replica's only thread; a second one would share the model's hooks."""
    port = int(deployed.url.rstrip("/").rpartition(":")[2])
    other = {"text": "the sailor saw the harbour", "blocks": 3}
    expected = without_time(json.loads(json.dumps(service.answer(other))))
    body = json.dumps({**QUESTION, "candidates": 400}).encode()
    head = "POST /attribute HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for _ in range(3):
        with contextlib.ExitStack() as open_connections:
            for _ in range(2):
                connection = open_connections.enter_context(socket.create_connection(("127.0.0.1", port)))
                connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.15)
        with ThreadPoolExecutor(2) as clients:
            found = list(clients.map(lambda _: patiently(deployed.url, other), range(2)))
        assert [without_time(each) for _, each in found] == [expected] * 2


def test_a_hundred_megabytes_leave_no_trace_in_the_deployed_service(deployed):
    pieces = (b"a" * 2**16 for _ in range(1600))
    connection = http.client.HTTPConnection(deployed.url.removeprefix("http://").strip("/"), timeout=60)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.request("POST", "/attribute", pieces, {"Content-Type": "application/json"}, encode_chunked=True)
    with contextlib.suppress(ConnectionResetError):
        assert connection.getresponse().status == 413
    family = psutil.Process(deployed.process.pid).children(recursive=True)
    named = [each for each in family if "gateway" in " ".join(each.cmdline()) or "Proxy" in " ".join(each.cmdline())]
    assert len(named) == 2
    assert all(each.memory_info().rss < 700 * 2**20 for each in named)
    assert patiently(deployed.url, QUESTION)[0] == 200


def test_it_ends_when_it_is_told_to(deployed):
    deployed.process.send_signal(signal.SIGTERM)
    assert deployed.process.wait(60) == 143
    # Ray's actors may report a call to the replica that a test killed.
    own = [line for line in deployed.lines if " pid=" not in line]
    assert not any("Traceback" in line for line in own), "".join(own)


@pytest.mark.cluster
def test_another_run_takes_over_without_a_gap(run, one_ray, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    other = shutil.copytree(run.store.root, tmp_path / "other")
    url, found, stop = f"http://127.0.0.1:{port}/", [], threading.Event()
    try:
        serve.start(proxy_location="HeadOnly", http_options={"port": port}, logging_config=QUIET)
        serve.run(build(Options(run=run.url)), name=APPLICATION, logging_config=QUIET)

        def keep_asking():
            while not stop.is_set():
                found.append(ask(url, QUESTION))

        clients = [threading.Thread(target=keep_asking) for _ in range(3)]
        for client in clients:
            client.start()
        serve.run(build(Options(run=str(other))), name=APPLICATION, logging_config=QUIET)
        deadline = time.monotonic() + 60
        while found[-1][1].get("run", {}).get("run") != str(other) and time.monotonic() < deadline:
            time.sleep(0.1)
        stop.set()
        for client in clients:
            client.join()
    finally:
        stop.set()
        serve.shutdown()
    assert {status for status, _ in found} == {200}
    assert {told["run"]["run"] for _, told in found} == {run.url, str(other)}


def test_a_taken_port_and_an_open_address_are_told_at_once(run, told, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"Cannot listen at 127.0.0.1:{port} (" in told("serve", run.url, "--port", str(port))
    assert "Cannot listen at 127.0.0.1:70000 (" in told("serve", run.url, "--port", "70000")
    assert "set STRIDE_RAY_TOKEN to a token" in told("serve", run.url, "--host", "0.0.0.0")
    monkeypatch.setenv("STRIDE_RAY_TOKEN", "kö")
    assert "characters that a header cannot carry" in told("serve", run.url)


def test_more_replicas_than_the_cluster_has_room_for_are_told_at_once(run, told):
    assert "compute asks for 200 worker(s) with a CPU each" in told("serve", run.url, "--workers", "200")
