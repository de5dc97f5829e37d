"""Submit a job to a Ray cluster, stream its log, and exit with its status; for schedulers that run a nightly scan.

`ray job submit` exits with 1 for any failed job, whatever its status, and with 0 for a stopped one. This script exits
with the job's own status (2 from `jobs/scan.py` means new findings) and with 130 for a stopped job. On SIGTERM it stops
the job and exits with 143. A job that was lost with its driver's node, or whose driver was killed, is submitted again
and resumes.

    python jobs/submit.py --address http://head:8265 -- python /opt/stride_ray/jobs/scan.py s3://bucket/run --out …

It honours the environment variables of `ray job submit`: RAY_API_SERVER_ADDRESS, RAY_AUTH_MODE, RAY_AUTH_TOKEN.
"""

import argparse
import asyncio
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from stride_ray.cli.exits import exit_status
from stride_ray.runtime.errors import StrideError

# Seconds between polls of a job, and seconds without a response after which the head node is given up.
LOOK, SILENCE = 2.0, 600.0
# Shells report a driver that was killed by a signal as status 128 or more. Such a job is lost, except for an interrupt.
KILLED, INTERRUPTED = 128, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, submit the job and follow its log; returns the job's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default=None, metavar="URL", help="of the Jobs API, as http://head:8265")
    parser.add_argument("--working-dir", default=None, metavar="DIR", help="uploaded; the job starts in it")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for the job; repeatable")
    parser.add_argument("--tries", type=int, default=3, help="of a job that is lost with its node (default: 3)")
    parser.add_argument("command", nargs="+", help="after --")
    parsed = parser.parse_args(arguments)
    return exit_status("submit", lambda: _submit(parsed))


def _submit(parsed: argparse.Namespace) -> int:
    from ray.job_submission import JobStatus, JobSubmissionClient

    pairs = [text.partition("=") for text in parsed.env]
    if wrong := [name for name, equals, _ in pairs if not (name and equals)]:
        raise StrideError(f"--env {wrong[0]!r} is no NAME=VALUE.")
    environment: dict[str, Any] = {"env_vars": {name: value for name, _, value in pairs}}
    if parsed.working_dir:
        environment["working_dir"] = parsed.working_dir
    try:
        client = JobSubmissionClient(parsed.address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StrideError(f"No Jobs API answers at {parsed.address or 'RAY_API_SERVER_ADDRESS'}: {error}.") from None
    for left in reversed(range(parsed.tries)):
        job = client.submit_job(entrypoint=shlex.join(parsed.command), runtime_env=environment)
        print(f"submitted {job}", file=sys.stderr)
        try:
            _follow(client, job)
        except KeyboardInterrupt:
            client.stop_job(job)
            raise
        found = client.get_job_info(job)
        if found.status == JobStatus.SUCCEEDED:
            return 0
        if found.status == JobStatus.STOPPED:
            print(f"submit: {job} was stopped", file=sys.stderr)
            return INTERRUPTED
        code = found.driver_exit_code
        if code is not None and (0 < code < KILLED or code == INTERRUPTED):
            return int(code)
        print(f"submit: {job} was lost ({found.message}); {left} tries left", file=sys.stderr)
    return 1


def _follow(client: Any, job: str) -> None:
    """Print the job's log until the job ends."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    since = time.monotonic()
    while True:
        try:
            asyncio.run(tail())
            if client.get_job_status(job).is_terminal():
                return
            since = time.monotonic()
        except (ConnectionError, RuntimeError) as error:
            if time.monotonic() - since > SILENCE:
                raise StrideError(f"The head has not answered for {SILENCE:.0f} s: {error}.") from None
        time.sleep(LOOK)


if __name__ == "__main__":
    sys.exit(main())
