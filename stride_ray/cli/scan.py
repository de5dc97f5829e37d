"""The verb ``scan``: arguments, output, exit status, ``scan compare`` and ``scan review``.

Exit status: 0 nothing new; 2 new findings above the thresholds; 1 failure, including a bad command line and a webhook
that did not accept the summary; 130 interrupted, 143 by SIGTERM.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run

COMPARE = (
    "compare two nights: stride-ray scan compare A B, dated folders, prints what is new, changed and resolved in B; "
    "exit status 0 nothing new, 2 something is, 1 failure"
)

REVIEW = (
    "keep reviews of alarms: stride-ray scan review SCANS FILE…, files that a night's page saved; later nights do not "
    "raise what is reviewed as a false alarm, unless more of it leaks. --export FILE writes all reviews as labels"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments other than the run and its options."""
    parser.epilog = f"{COMPARE}. {REVIEW}."
    parser.add_argument("--out", required=True, metavar="URL", help="folder of all nights; the same every night")
    parser.add_argument(
        "--set-folder", action="append", default=[], metavar="FOLDER", help="evaluation sets, a file each; repeatable"
    )
    parser.add_argument(
        "--evaluation", action="append", default=[], metavar="[NAME=]PATH", help="one evaluation set; repeatable"
    )
    parser.add_argument(
        "--control", action="append", default=[], metavar="[NAME=]PATH", help="items that nobody published; repeatable"
    )
    parser.add_argument(
        "--fields", default="", metavar="ROLE=FIELD,…", help="fields of question, choices, answer, id, others"
    )
    parser.add_argument("--night", default="", metavar="NAME", help="name of the dated folder (default: today, UTC)")
    parser.add_argument("--webhook", default="", metavar="URL", help="where to POST the summary as JSON")
    parser.add_argument("--purify", default="", metavar="URL", help="new folder for the corpus without leaked spans")
    parser.add_argument("--purify-documents", action="store_true", help="leave out whole documents in place of spans")


def status_of(work: Callable[[], int]) -> int:
    """Run work that parses arguments, with argparse's exit status 2 changed to 1: for a scan 2 means new findings."""
    try:
        return work()
    except SystemExit as error:
        if error.code == 2:
            raise SystemExit(1) from None
        raise


def run_scan(run: Run, parsed: argparse.Namespace) -> int:
    """Run the verb and return its exit status."""
    from stride_ray.contamination.items import EvaluationSet, read_folder, read_set
    from stride_ray.contamination.nightly import scan
    from stride_ray.contamination.summary import headline

    fields = _fields(parsed.fields)

    def named(texts: Sequence[str]) -> list[EvaluationSet]:
        pairs = [text.rpartition("=") if "=" in text.partition("/")[0] else ("", "", text) for text in texts]
        return [read_set(path, name, fields) for name, _, path in pairs]

    sets = [each for folder in parsed.set_folder for each in read_folder(folder, fields)] + named(parsed.evaluation)
    done = scan(run, sets, parsed.out, named(parsed.control), parsed.night, parsed.webhook)
    for each in done["sets"]:
        told = ", ".join(f"{count} {verdict}" for verdict, count in each["verdicts"].items())
        print(f"{each['name']}: {each['items']} items, {told}; {each['new']} new")
        for reject in each["rejects"]:
            print(f"  not parsed: {reject}")
        for field in each["first_not_understood"]:
            print(f"  not understood, searched as plain text: {field}")
    print(headline(done))
    print(f"Report: {done['folder']}/report.md")
    if parsed.purify:
        from stride_ray.contamination.purify import purify

        counts = purify(run, parsed.out, done["night"], parsed.purify, parsed.purify_documents)
        print(
            f"Purified: {counts['documents'] - counts['left_out']} documents changed, {counts['left_out']} left out, "
            f"{counts['files']} files in {parsed.purify}"
        )
    if done["webhook"]:
        raise StrideError(f"The report is in place, but the webhook did not take the summary: {done['webhook']}.")
    return int(done["status"])


def compare_nights(arguments: Sequence[str]) -> int:
    """Run ``scan compare A B`` and return its exit status."""
    from stride_ray.contamination.compare import compare, describe

    parser = argparse.ArgumentParser(prog="stride-ray scan compare", description=COMPARE)
    parser.add_argument("a", metavar="A", help="dated folder of the earlier night")
    parser.add_argument("b", metavar="B", help="dated folder of the later night")
    parsed = parser.parse_args(arguments)
    found = compare(parsed.a, parsed.b)
    print(describe(found), file=sys.stdout)
    return 2 if found.new else 0


def review_alarms(arguments: Sequence[str]) -> int:
    """Run ``scan review SCANS FILE…`` and return its exit status."""
    from stride_ray.contamination.reviews import FALSE, import_reviews, last_reviews, review_lines
    from stride_ray.runtime.storage import Store

    parser = argparse.ArgumentParser(prog="stride-ray scan review", description=REVIEW)
    parser.add_argument("scans", metavar="SCANS", help="folder of all nights (--out of the scans)")
    parser.add_argument("files", metavar="FILE", nargs="*", help="reviews to keep")
    parser.add_argument("--export", default="", metavar="FILE", help="where to write each item's last review")
    parsed = parser.parse_args(arguments)
    store = Store(parsed.scans)
    if not store.exists("latest.json"):
        raise StrideError(f"{store.display_url('')} has no finished night; give the folder of all nights.")
    kept = sum(import_reviews(store, file) for file in parsed.files)
    found = last_reviews(store)
    if parsed.export:
        folder, _, name = parsed.export.rpartition("/")
        Store(folder or ".").write(name, review_lines(found))
    false = sum(row["review"] == FALSE for row in found)
    print(f"{kept} review(s) kept; {false} of {len(found)} reviewed items are false alarms.")
    return 0


def _fields(text: str) -> dict[str, str]:
    """Parse ROLE=FIELD pairs; in ``question=ctx,choices=a+b`` each of the fields a and b holds one choice.

    Raises:
        StrideError: a part has no equals sign or no value.
    """
    pairs = [part.partition("=") for part in text.split(",") if part]
    if not all(equals and value for _, equals, value in pairs):
        raise StrideError(f"--fields {text!r} is not a list of ROLE=FIELD.")
    return {role.strip(): value.strip().replace("+", ",") for role, _, value in pairs}
