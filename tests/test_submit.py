"""Every script of jobs/ through Ray's Jobs API: status, logs, exit status; a stopped job goes on when resubmitted."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import data_files, documents, flags, run_plainly, settings, verbs, write_lines
from ray.job_submission import JobStatus, JobSubmissionClient
from servers import free_port
from test_faults import kill_family

from stride_ray.cli.main import main

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parent.parent
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A head with its Jobs API, and the folder that is uploaded: the package and its jobs, nothing else."""
    upload = tmp_path_factory.mktemp("upload")
    for name in ("stride_ray", "jobs"):
        shutil.copytree(ROOT / name, upload / name, ignore=shutil.ignore_patterns("__pycache__"))
    ports = {name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    # A folder of its own, short enough for a socket's name: the usual one tells every ray.init where this head is.
    own = tempfile.mkdtemp(prefix="ray-")
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        f"--temp-dir={own}",
    ]
    command += ["--ray-client-server-port", str(free_port()), *(f"--{name}={port}" for name, port in ports.items())]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RAY_AUTH_MODE": "disabled"}  # else the head wants a token of its making
    log = upload.parent / f"{upload.name}.log"
    with open(log, "wb") as file:
        head = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while True:
            try:
                made = JobSubmissionClient(f"http://127.0.0.1:{ports['dashboard-port']}")
                made.submit_job(entrypoint="true")
                break
            except Exception:
                assert head.poll() is None, log.read_text()[-1000:]
                assert time.monotonic() < until, log.read_text()[-1000:]
                time.sleep(0.5)
        yield made, str(upload)
    finally:
        head.terminate()
        kill_family(head)
        shutil.rmtree(own, ignore_errors=True)


def submit(client, *words):
    made, upload = client
    environment = {"working_dir": upload, "env_vars": {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}}
    entrypoint = " ".join(f"'{word}'" for word in ("python", *map(str, words)))
    return made.submit_job(entrypoint=entrypoint, runtime_env=environment)


def await_end(client, job, limit=240):
    until = time.monotonic() + limit
    while client[0].get_job_status(job) not in ENDED:
        assert time.monotonic() < until, client[0].get_job_logs(job)[-3000:]
        time.sleep(0.3)
    return client[0].get_job_status(job), client[0].get_job_logs(job)


@pytest.fixture(scope="module")
def local(parts, tmp_path_factory):
    """Data files of the same run without Ray."""
    folder = tmp_path_factory.mktemp("local") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run_plainly(patch)
        for command in verbs(str(folder), str(parts.queries), settings(parts)):
            assert main(command) == 0
    return data_files(folder)


def test_every_job_that_a_run_is_made_of(client, parts, local, tmp_path):
    run = tmp_path / "run"
    for verb, *words in verbs(str(run), str(parts.queries), settings(parts)):
        status, logs = await_end(client, submit(client, f"jobs/{verb}.py", *words))
        assert status == JobStatus.SUCCEEDED, logs[-3000:]
    assert data_files(run) == local
    items = write_lines(tmp_path / "items.jsonl", [{"question": "whose quokka sold seven umbrellas", "answer": "x"}])
    after = [
        (["select", run, "--name", "asked", "--out", tmp_path / "chosen", "--tokens", "0.5"], "documents"),
        (["scan", run, "--evaluation", items, "--out", tmp_path / "scans", "--set", "scan.influence=false"], "Report:"),
        (["tailpatch", run, "--name", "asked", "--k", "3"], "lift"),
        (["trust", run, "--name", "asked"], "Trust:"),
        (["plant", "write", tmp_path / "planted", "--questions", items, "--text", items, "--items", "1"], "needs 201"),
    ]
    for (name, *words), wanted in after:
        status, logs = await_end(client, submit(client, f"jobs/{name}.py", *words))
        assert wanted in logs, logs[-3000:]
        assert status == (JobStatus.FAILED if name == "plant" else JobStatus.SUCCEEDED)


def test_the_commands_of_the_cluster_page(client, parts, tmp_path):
    made, upload = client
    snippets = re.findall(r"^```sh\n(.*?)^```", (ROOT / "cluster/README.md").read_text("utf-8"), re.M | re.S)
    (snippet,) = (each for each in snippets if "ray job submit" in each)
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    for name in ("corpus", "model", "queries.jsonl"):
        (bucket / name).symlink_to(parts.root / name)
    assert "http://127.0.0.1:8265" in snippet
    snippet = snippet.replace("http://127.0.0.1:8265", made.get_address()).replace("s3://BUCKET", str(bucket))
    snippet = snippet.replace("--input", "--block-tokens 32 --input")  # the tiny model has room for no more
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        ["bash", "-euc", snippet], cwd=upload, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "Page:" in done.stdout
    assert list((bucket / "chosen/data").iterdir())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evaluate", "--benchmark", "/nowhere", "--out", "/tmp/none"], "/nowhere"),
        (["retrain", "--benchmark", "/nowhere", "--out", "/tmp/none"], "/nowhere"),
        (["select_domains", "--benchmark", "/nowhere", "--out", "/tmp/none"], "/nowhere"),
        (["import_truth", "--from", "dattri", "--files", "/none", "--benchmark", "/nowhere"], "/nowhere"),
        (["sft", "--instructions", "/nowhere.jsonl", "--model", "/no/model", "--out", "/tmp/none"], "/no/model"),
        (["retrieval", "/tmp/none", "--queries", "x"], "invalid int"),
        (["benchmark", "nosuch"], "invalid choice"),
        (["chaos", "--rounds", "x", "--out", "/tmp/none"], "invalid int"),
        (["quickstart", "--folder", "x", "y"], "unrecognized"),
        (["fit", "/nowhere", "--set", "compute.workers=99"], "stride-ray shard"),
    ],
)
def test_a_job_that_cannot_work_fails_with_a_sentence(client, words, told):
    status, logs = await_end(client, submit(client, f"jobs/{words[0]}.py", *words[1:]))
    assert status == JobStatus.FAILED, logs[-3000:]
    assert told in logs
    assert "Traceback" not in logs


def test_a_stopped_job_goes_on_when_it_is_submitted_again(client, parts, tmp_path):
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"text": text} for text in documents(720, seed=5)])
    options = settings(parts, corpus__input=[corpus])
    markers = tmp_path / "run/blocks/_tokenised/_done"
    command = ["jobs/shard.py", tmp_path / "run", *flags(options)]
    job = submit(client, *command)
    until = time.monotonic() + 120
    while len(list(markers.glob("*.json"))) < 3:
        assert time.monotonic() < until, client[0].get_job_logs(job)[-3000:]
        time.sleep(0.01)
    client[0].stop_job(job)
    assert await_end(client, job)[0] == JobStatus.STOPPED
    kept = {path: path.stat().st_mtime_ns for path in markers.glob("*.json")}
    assert kept
    assert not (tmp_path / "run/blocks/manifest.json").exists()
    status, logs = await_end(client, submit(client, *command))
    assert status == JobStatus.SUCCEEDED, logs[-3000:]
    with pytest.MonkeyPatch.context() as patch:
        run_plainly(patch)
        assert main(["shard", str(tmp_path / "plain"), *flags(options)]) == 0
    assert data_files(tmp_path / "run") == data_files(tmp_path / "plain")


def nightly(client, *words):
    """jobs/submit.py, as a schedule runs it."""
    made, upload = client
    command = [
        sys.executable,
        str(ROOT / "jobs" / "submit.py"),
        "--address",
        made.get_address(),
        "--working-dir",
        upload,
    ]
    return subprocess.Popen(
        [*command, "--env", "HF_HUB_OFFLINE=1", "--", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )


@pytest.mark.parametrize("status", [0, 2, 7])
def test_the_submitter_ends_with_the_status_of_the_job(client, status):
    done = nightly(client, "python", "-c", f"print('seen by all'); raise SystemExit({status})")
    out, err = done.communicate(timeout=120)
    assert done.returncode == status, err
    assert "seen by all" in out


def test_the_submitter_stops_its_job_when_it_is_told_to_stop(client):
    watcher = nightly(client, "python", "-c", "import time; print('begun', flush=True); time.sleep(300)")
    assert any("begun" in line for line in watcher.stdout)
    watcher.terminate()
    _, err = watcher.communicate(timeout=60)
    assert watcher.returncode == 143, err
    (job,) = [word for word in err.split() if word.startswith("raysubmit_")][:1]
    assert await_end(client, job)[0] == JobStatus.STOPPED


def test_the_submitter_submits_a_lost_job_again(client, tmp_path):
    once = "import os, pathlib, signal; seen = pathlib.Path('{}'); first = not seen.exists(); seen.touch(); "
    once += "os.kill(os.getpid(), signal.SIGKILL) if first else print('second try')"
    done = nightly(client, "python", "-c", once.format(tmp_path / "seen"))
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert "second try" in out
    assert "2 tries left" in err


def test_the_submitter_tells_a_wrong_address():
    command = [sys.executable, str(ROOT / "jobs" / "submit.py"), "--address", f"http://127.0.0.1:{free_port()}"]
    done = subprocess.run([*command, "--", "true"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "No Jobs API answers at http://127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr
