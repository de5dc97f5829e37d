"""The manifests of cluster/: Ray's launcher accepts them, they agree with each other, and what they start exists."""

import importlib
import json
import re
import shlex
from importlib.metadata import requires
from pathlib import Path

import pytest
import ray
import yaml
from ray import serve
from ray.autoscaler._private.util import validate_config
from ray.autoscaler.sdk import fillout_defaults
from ray.serve.schema import ServeDeploySchema

from stride_ray import __version__
from stride_ray.cli.main import _parser
from stride_ray.runtime.errors import StrideError
from stride_ray.runtime.progress import METRICS
from stride_ray.serve.application import Options

FOLDER = Path(__file__).parent.parent / "cluster"
IMAGE = f"REGISTRY/stride-ray:{__version__}-ray{ray.__version__}"
GPU = "nvidia.com/gpu"


def read(name):
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def clusters():
    """Every RayCluster's spec by the file and the kind that it is in."""
    found = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            spec = document.get("spec", {})
            spec = {
                "RayCronJob": spec.get("jobTemplate", {}),
                "RayCluster": {"rayClusterSpec": spec},
                "RayService": {"rayClusterSpec": spec.get("rayClusterConfig")},
            }.get(document.get("kind"), spec)
            if "rayClusterSpec" in spec:
                found[f"{path.name} {document['kind']}"] = spec["rayClusterSpec"]
    return found


def commands():
    """Every command that a manifest starts, as words, with its file."""
    found = []
    for path in sorted(FOLDER.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            spec = document.get("spec", {})
            if document.get("kind") == "CronJob":
                container = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
                found.append((path.name, [*container["command"], *container["args"]]))
            entrypoint = spec.get("entrypoint") or spec.get("jobTemplate", {}).get("entrypoint")
            if entrypoint:
                words = shlex.split(entrypoint)
                inner = words[2].split("&&") if words[:2] == ["sh", "-c"] else [entrypoint]
                found += [(path.name, shlex.split(each)) for each in inner]
    return found


def containers(spec):
    return [
        container
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
        for container in group["template"]["spec"]["containers"]
    ]


def test_there_is_a_manifest_for_every_use():
    assert set(clusters()) == {
        "attribute.yaml RayJob",
        "select.yaml RayJob",
        "nightly-raycronjob.yaml RayCronJob",
        "nightly-cronjob.yaml RayCluster",
        "serve.yaml RayService",
    }


def test_the_image_is_built_from_the_ray_that_is_pinned_here():
    dockerfile = (FOLDER / "Dockerfile").read_text()
    (base,) = re.findall(r"^FROM rayproject/ray:([\d.]+)-py312-gpu$", dockerfile, re.MULTILINE)
    assert base == ray.__version__
    assert f'"ray=={ray.__version__}"' in dockerfile
    assert any(re.match(r"ray\[.*>=2\.60", line) for line in requires("stride-ray"))
    copied = re.findall(r"^COPY (?:--chown=\S+ )?(.+) (\S+)$", dockerfile, re.MULTILINE)
    for sources, _ in copied:
        for source in sources.split():
            assert (FOLDER.parent / source).exists(), source


@pytest.mark.parametrize("where", clusters())
def test_a_ray_cluster_on_kubernetes(where):
    spec = clusters()[where]
    assert spec["rayVersion"] == ray.__version__
    assert {container["image"] for container in containers(spec)} == {IMAGE}
    assert spec["authOptions"] == {"mode": "token"}
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert GPU not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    terms = head["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    kept_off = {each["key"] for each in terms["nodeSelectorTerms"][0]["matchExpressions"]}
    assert {"karpenter.sh/capacity-type", "cloud.google.com/gke-spot"} <= kept_off
    assert spec["enableInTreeAutoscaling"] is True
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
        assert "num-cpus" not in group["rayStartParams"]
    for container in containers(spec):
        asked = container["resources"]
        assert (
            asked["requests"] == asked["limits"]
        )  # a pod that may take more than it asked for is the first to be killed
        assert {"cpu", "memory"} <= set(asked["requests"])
        assert {"containerPort": 8080, "name": "metrics"} in container["ports"]
        assert container["envFrom"] == [{"secretRef": {"name": "stride-ray-s3"}}]
    gpus = [group for group in spec["workerGroupSpecs"] if group["groupName"] == "gpu"]
    assert bool(gpus) == (where != "select.yaml RayJob")
    for group in gpus:
        assert group["template"]["spec"]["containers"][0]["resources"]["limits"][GPU] == "1"
        assert {"key": GPU, "operator": "Exists", "effect": "NoSchedule"} in group["template"]["spec"]["tolerations"]


def test_clusters_differ_in_nothing_but_gpus():
    ours = clusters()
    one = ours["attribute.yaml RayJob"]
    for where, spec in ours.items():
        kinds = {"select.yaml RayJob": {"cpu"}, "serve.yaml RayService": {"gpu"}}.get(where, {"cpu", "gpu"})
        groups = [group for group in one["workerGroupSpecs"] if group["groupName"] in kinds]
        if where == "serve.yaml RayService":
            container = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
            container["ports"].remove({"containerPort": 8000, "name": "serve"})
        assert spec == {**one, "workerGroupSpecs": groups}


@pytest.mark.parametrize(("name", "words"), commands())
def test_commands_exist_and_their_arguments_are_understood(name, words):
    submitted = words
    if words[1].endswith("submit.py"):
        at = words.index("--")
        assert Path("/opt/stride_ray/jobs/submit.py") == Path(words[1])
        submitted = words[at + 1 :]
    python, script, *arguments = submitted
    assert python == "python"
    job = FOLDER.parent / Path(script).relative_to("/opt/stride_ray")
    assert job.exists()
    parsed = _parser().parse_args([job.stem, *arguments])
    assert parsed.run == "s3://BUCKET/runs/pool"
    if getattr(parsed, "compute.device", None) == "cuda":
        assert "gpu" in {g["groupName"] for g in clusters()[f"{name} RayJob"]["workerGroupSpecs"]}


def test_the_service_is_one_that_ray_serve_deploys(monkeypatch):
    (service,) = read("serve.yaml")
    config = ServeDeploySchema(**yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    built = getattr(importlib.import_module(module), name)
    options = Options(**application.args)
    assert options.host == config.http_options.host == "0.0.0.0"
    assert options.device == "cuda"
    with pytest.raises(StrideError, match="set STRIDE_RAY_TOKEN"):
        built(options)
    monkeypatch.setenv("STRIDE_RAY_TOKEN", "secret")
    assert isinstance(built(options), serve.Application)


def test_the_plain_cron_job_never_runs_twice_at_once():
    cluster, cron = read("nightly-cronjob.yaml")
    spec = cron["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["jobTemplate"]["spec"]["backoffLimit"] == 0
    container = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == IMAGE
    name = cluster["metadata"]["name"]
    assert f"--address=http://{name}-head-svc:8265" in container["args"]
    token = next(each for each in container["env"] if each["name"] == "RAY_AUTH_TOKEN")
    assert token["valueFrom"]["secretKeyRef"]["name"] == name
    (alpha,) = read("nightly-raycronjob.yaml")
    assert alpha["spec"]["schedule"] == spec["schedule"]
    words = shlex.split(alpha["spec"]["jobTemplate"]["entrypoint"])
    said = [part for word in container["args"][4:] for part in word.split("=", 1 if word.startswith("--") else 0)]
    assert words[2:] == said


def test_ray_up_accepts_the_cluster_on_aws():
    (config,) = read("ray-up-aws.yaml")
    validate_config(fillout_defaults(config))
    assert config["docker"]["image"] == IMAGE
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]  # the driver's node is not to be taken back
    assert {name: kind["min_workers"] for name, kind in types.items()} == {"cpu": 0, "gpu": 0}
    assert types["gpu"]["resources"]["GPU"] == 1
    assert sum(kind["max_workers"] for kind in types.values()) <= config["max_workers"]
    assert "--num-cpus=0" in config["head_start_ray_commands"][1]


def test_a_wrong_key_in_the_aws_file_is_found():
    (config,) = read("ray-up-aws.yaml")
    with pytest.raises(Exception, match="idle_minutes"):
        validate_config(fillout_defaults({**config, "idle_minutes": 3}))


def test_monitors_scrape_the_pods_of_the_manifests():
    kinds = {monitor["spec"]["selector"]["matchLabels"]["ray.io/node-type"] for monitor in read("monitors.yaml")}
    assert kinds == {"head", "worker"}
    for monitor in read("monitors.yaml"):
        assert monitor["spec"]["podMetricsEndpoints"][0]["port"] == "metrics"


def test_the_operations_page_quotes_what_is_really_said():
    page = (FOLDER / "README.md").read_text()
    (table,) = re.findall(r"## What to watch\n(.*?)\n## ", page, re.DOTALL)
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")][1:]
    quoted = [text for row in rows for text in re.findall("`([^`]+)`", row) if " " in text]
    source = "\n".join(path.read_text() for path in sorted((FOLDER.parent / "stride_ray").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    assert len(quoted) > 5
    for text in quoted:
        # Between numbers, names and omissions, which differ.
        pieces = re.split(r"\b\d+\b|…|\bGPUs?\b|\bCPUs?\b|model\.dtype", text)
        for piece in (each.strip(" ,;=") for each in pieces):
            assert piece in source, text


def test_the_dashboard_draws_every_metric_of_ours_and_no_other():
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    drawn = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {name for text in drawn for name in re.findall(r"ray_(stride_\w+)", text)}
    assert named == {name + ("_total" if kind == "counter" else "") for name, (kind, _) in METRICS.items()}
    assert all(panel["description"] for panel in dashboard["panels"])
