"""Status of a run directory: whether each stage is done, under way or missing, with key figures."""

from typing import Any

from stride_ray.attribution.attribute import mode_of, reliability_note
from stride_ray.runtime.config import STAGES
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.run import Run
from stride_ray.runtime.urls import redact_url


def status(run: Run) -> str:
    """A summary for display, with a line per stage and query set.

    Raises:
        StrideError: this is not a run directory.
    """
    if not run.store.exists("run.toml"):
        raise StrideError(
            f"{redact_url(run.url)} is not a run directory: it has no run.toml; 'stride-ray shard' makes one."
        )
    lines = [f"run {redact_url(run.url)}, whose answers are {mode_of(run)} (attribute.exact)"]
    for stage in STAGES:
        lines += [_line(run, stage, name) for name in _names(run, stage)]
    return "\n".join(lines)


def _names(run: Run, stage: str) -> list[str]:
    """The query sets to show for a stage; a stage of the whole pool has one without a name."""
    if stage in ("blocks", "operators", "curvature"):
        return [""]
    names = run.store.names(stage)
    if stage == "directions":  # gradients on their way into tables, which remove them when finished
        return [name for name in names if run.stage(stage, name).has_tensors()]
    return names or ["(none)"]


def _line(run: Run, stage: str, name: str) -> str:
    title = f"{stage}/{name}" if name else stage
    opened = run.stage(stage, "" if name == "(none)" else name)
    if name == "(none)" or not opened.store.exists("stage.json"):
        return f"  {title:<28} missing"
    markers = opened.done().values()
    cost = f"{sum(marker['seconds'] for marker in markers):.1f} worker-seconds"
    cost += f", at most {max((marker['peak_mb'] for marker in markers), default=0)} MB a worker"
    if not opened.is_finished():
        return f"  {title:<28} under way or interrupted: {len(markers)} unit(s) done; run it again to go on"
    facts = opened.manifest()
    behind = run.stage("blocks").manifest()["blocks"] - facts["blocks"] if stage == "operators" else 0
    more = f"; {behind} blocks were sharded since and are not in it" if behind else ""
    return f"  {title:<28} done, {_figures(stage, facts)}{more}; {cost}"


def _figures(stage: str, facts: dict[str, Any]) -> str:
    if stage == "blocks":
        return f"{facts['blocks']} blocks, {facts['documents']} documents, {facts['rejected']} rejected"
    if stage == "operators":
        learned = "" if facts["learned"] else " (WARNING: learned nothing)"
        if facts.get("form") == "sites":
            size = f"{facts['row_bytes'] / 1024:.1f} KiB each, {facts['subsets'] * facts['row_bytes'] / 1e6:.3g} MB"
            return f"{facts['subsets']} operators of {facts['rows']} at {len(facts['sites'])} sites, {size}{learned}"
        return f"{facts['subsets']} operators, {facts['method']}{learned}"
    if stage == "curvature":
        return f"{len(facts['sites'])} sites"
    if stage == "responses":
        return f"{facts['queries']} queries, {facts['failed']} failed, {facts['mode']}{reliability_note(facts)}"
    exact = f" ({facts['exact']} of them exact)" if "exact" in facts else ""
    median = f"median {facts['median_nonzeros']:g} a query"
    return f"{facts['rows']} influences{exact} of {facts['queries']} queries, {median}"
