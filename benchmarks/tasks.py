"""Instruction tasks from parts that install offline, and a small base model, for selection by task (unigram F1).

Six tasks, in place of FLAN's sixty-six: three templates of GSM8K (solve a problem, only begin to, write the problem of
an answer) and three of Python's standard library (describe a function, write its signature, rename an identifier). The
base model has read other rows and functions as plain text, and no instruction.
"""

import ast
import gzip
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from benchmarks.output import write_lines
from stride_ray.corpus.blocks import Blocks
from stride_ray.corpus.shard import shard
from stride_ray.models.builtin.toy import train_model, train_tokenizer
from stride_ray.runtime.run import Run

# Share of rows and functions that become instructions; the rest is the base model's text.
SHARE = 0.3
BLOCK_TOKENS, EPOCHS = 256, 3
_IDENTIFIER = re.compile(r"^[a-z]+(_[a-z]+){1,3}$")
_CALCULATION = re.compile(r"<<.*?>>")


def write_tasks(gsm8k: str, folder: str, per_task: int, seed: int) -> Path:
    """Write instructions.jsonl (question, answer, task) and train the base model, model/; finished parts are kept.

    Args:
        gsm8k: its training rows, JSON Lines, .gz too.
        folder: local.
        per_task: instructions of each task.
        seed: of the draw.

    Returns:
        The folder.
    """
    root, rng = Path(folder), random.Random(seed)
    root.mkdir(parents=True, exist_ok=True)
    opened = gzip.open if gsm8k.endswith(".gz") else open
    with opened(gsm8k, "rt", encoding="utf-8") as file:
        problems = [(row["question"], _CALCULATION.sub("", row["answer"])) for row in map(json.loads, file)]
    routines = sorted(set(functions(Path(sysconfig.get_path("stdlib")))))
    for items in (problems, routines):
        rng.shuffle(items)
    asked, known = problems[: int(SHARE * len(problems))], problems[int(SHARE * len(problems)) :]
    described, read = routines[: int(SHARE * len(routines))], routines[int(SHARE * len(routines)) :]
    rows = [row for task in tasks(asked, described).values() for row in rng.sample(task, min(per_task, len(task)))]
    rng.shuffle(rows)
    write_lines(root / "instructions.jsonl", rows)
    texts = [f"{question}\n{answer}" for question, answer in known]
    texts += [f'{signature}\n    """{line}"""' for signature, line in read]
    rng.shuffle(texts)
    write_lines(root / "texts.jsonl", [{"text": text} for text in texts])
    train_tokenizer(texts, root / "tokenizer")
    settings = {"corpus.input": [f"{root}/texts.jsonl"], "corpus.tokenizer": f"{root}/tokenizer"}
    run = Run(f"{root}/run", changes={**settings, "corpus.block_tokens": BLOCK_TOKENS})
    shard(run)
    train_model(Blocks(run.stage("blocks").store), root / "tokenizer", root / "model", EPOCHS)
    return root


def functions(library: Path) -> Iterator[tuple[str, str]]:
    """(signature, first line of the docstring) of each documented function of the library's modules."""
    for path in sorted(library.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                line = text.splitlines()[0].strip()
                if 20 <= len(line) <= 100 and not node.name.startswith("_"):
                    yield f"def {node.name}({ast.unparse(node.args)}):", line


def tasks(problems: list[tuple[str, str]], routines: list[tuple[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The instructions of each task, as rows with question, answer and task."""
    names = sorted({name for signature, _ in routines if _IDENTIFIER.match(name := signature[4:].partition("(")[0])})
    pairs = {
        "solve": [(f"{question}\n", answer) for question, answer in problems],
        "begin": [(f"{question}\nWhat comes first?\n", answer.splitlines()[0]) for question, answer in problems],
        "pose": [(f"Pose the problem of this answer: {answer}\n", question) for question, answer in problems],
        "describe": [(f"{signature}\nWhat does it do?\n", line) for signature, line in routines],
        "sign": [(f"Write a function. {line}\n", signature) for signature, line in routines],
        "rename": [(f"Rename {name} as a class.\n", name.replace("_", " ").title()) for name in names],
    }
    return {
        task: [{"question": question, "answer": answer, "task": task} for question, answer in each]
        for task, each in pairs.items()
    }
