"""Job: write a labelled set for contamination scans, or measure a scan and two other rules on one.

``write`` makes the corpus, the items and their labels from word problems, WordNet's nouns, Bible verses, public texts
(speeches, licences, formulas, idioms of code, everyday questions) and plain text. ``measure`` prints how many items of
each kind are found, precision and recall, by a regular scan, by lm-evaluation-harness's rule and by decon's, and one
JSON object on the last line. Exit status: 0 done, 1 failed with a message on standard error, 130 interrupted.

    python jobs/label_scan.py write FOLDER --problems gsm8k_test.jsonl.gz --nouns data.noun --verses verses.txt
        --public FOLDER --filler FILE
    python jobs/label_scan.py measure FOLDER
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from stride_ray.cli.exits import exit_status
from stride_ray.evaluate.leaks.labelled import label_scan, read_material, write_labelled
from stride_ray.evaluate.leaks.scanners import measure_rules, table


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, write or measure, and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    write = verbs.add_parser("write", help="make a labelled set")
    write.add_argument("folder", type=Path, help="output folder")
    write.add_argument("--problems", required=True, help="JSON Lines (.gz too) with question and answer")
    write.add_argument("--nouns", type=Path, required=True, help="WordNet's data.noun")
    write.add_argument("--verses", type=Path, required=True, help="lines such as 'Ge1:1 In the beginning …'")
    write.add_argument("--public", type=Path, required=True, help="folder with speeches.jsonl, licences.jsonl, …")
    write.add_argument("--filler", required=True, action="append", help="file or folder of plain text; repeatable")
    write.add_argument("--each", type=int, default=12, help="items of a kind (default: 12)")
    write.add_argument("--seed", type=int, default=0)
    measured = verbs.add_parser("measure", help="scan, compare with the labels")
    measured.add_argument("folder", type=Path, help="what 'write' made")
    asked = parser.parse_args(arguments)

    def run() -> None:
        if asked.verb == "write":
            material = read_material(asked.problems, asked.nouns, asked.verses, asked.public, asked.filler)
            found = label_scan(material, asked.each, asked.seed)
            write_labelled(found, asked.folder)
            print(f"{len(found.items)} items and {len(found.corpus)} documents in {asked.folder}.")
            return
        rules = measure_rules(asked.folder)
        print(table(rules))
        print(json.dumps([rule.facts() for rule in rules]))

    return exit_status("label_scan", run)


if __name__ == "__main__":
    sys.exit(main())
