"""What is in serving/ can be read, agrees with itself, and names metrics, images and variables that exist."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private import replica
from ray.serve.llm import LLMConfig
from ray.serve.schema import ServeDeploySchema

import clover_vllm
from clover_vllm.cluster.dashboard import NAME, for_ray, ray_name
from clover_vllm.cluster.server import CloverServer
from clover_vllm.cluster.serving import with_defaults
from clover_vllm.engine.metrics import _counters, _histogram

ROOT = Path(__file__).parents[3]
SERVING = ROOT / "serving"
IMAGE = f"clover-vllm:{clover_vllm.__version__}"
PROMETHEUS_OWN = {"process_start_time_seconds"}


def documents(path: str) -> list[Any]:
    return list(yaml.safe_load_all((SERVING / path).read_text()))


def by_kind(path: str) -> dict[str, Any]:
    return {document["kind"]: document for document in documents(path)}


def pods(document: Any) -> list[Any]:
    """Pod specifications anywhere in a manifest."""
    if isinstance(document, dict):
        own = [document] if "containers" in document else []
        return own + [pod for value in document.values() for pod in pods(value)]
    return [pod for value in document for pod in pods(value)] if isinstance(document, list) else []


MANIFESTS = ["kubernetes/vllm-serve.yaml", "kubernetes/rayservice.yaml", "kubernetes/batch-rayjob.yaml"]


@pytest.mark.parametrize("path", MANIFESTS)
def test_pods_have_whole_cores_one_image_and_no_rights(path: str) -> None:
    found = [pod for document in documents(path) for pod in pods(document)]
    assert found
    for document in documents(path):
        assert {"apiVersion", "kind", "metadata"} <= document.keys()
        assert document["metadata"]["name"].startswith("clover")
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert container["image"] == IMAGE
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert container["resources"]["limits"]["cpu"].isdigit()
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes


def test_plain_servers_are_probed_drained_and_never_all_gone() -> None:
    found = by_kind("kubernetes/vllm-serve.yaml")
    deployment = found["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels
    for kind in ("PodDisruptionBudget", "PodMonitor"):
        assert found[kind]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert deployment["replicas"] > found["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    assert deployment["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    drain = next(int(a.split("=")[1]) for a in container["args"] if a.startswith("--shutdown-timeout"))
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pause + drain < pod["terminationGracePeriodSeconds"]


def test_rayservice_serves_what_serve_yaml_says() -> None:
    service = by_kind("kubernetes/rayservice.yaml")["RayService"]["spec"]
    (serve,) = documents("ray/serve.yaml")
    (workers,) = service["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    cores = int(workers["rayStartParams"]["num-cpus"])
    assert container["resources"]["limits"]["cpu"] == str(cores)
    (model,) = serve["applications"][0]["args"]["llm_configs"]
    model["placement_group_config"] = {"bundle_per_worker": {"CPU": cores}}  # a pod is a replica
    assert yaml.safe_load(service["serveConfigV2"]) == serve
    assert workers["maxReplicas"] >= model["deployment_config"]["autoscaling_config"]["max_replicas"]


def test_ray_is_one_version_everywhere() -> None:
    pinned = importlib.metadata.version("ray")
    assert f"ray=={pinned}\n" in (ROOT / "requirements" / "ray.lock").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["ray"] == [f"ray[serve]=={pinned}"]
    for path, spec in (("rayservice", "rayClusterConfig"), ("batch-rayjob", "rayClusterSpec")):
        document = documents(f"kubernetes/{path}.yaml")[0]
        assert document["spec"][spec]["rayVersion"] == pinned


def test_serve_yaml_makes_replicas_of_cores_alone() -> None:
    """Through Ray's own models, without a cluster."""
    (given,) = documents("ray/serve.yaml")
    ServeDeploySchema.model_validate(given)
    args = with_defaults(given["applications"][0]["args"])
    (model,) = args["llm_configs"]
    made = LLMConfig.model_validate(model)
    assert made.server_cls is CloverServer
    engine = made.get_engine_config()
    assert engine.placement_bundles == [{"CPU": 1}]
    deployment = model["deployment_config"]
    assert deployment["max_ongoing_requests"] == model["engine_kwargs"]["max_num_seqs"]
    assert deployment["autoscaling_config"]["target_ongoing_requests"] == 8
    assert deployment["max_ongoing_requests"] == 16
    assert deployment["graceful_shutdown_timeout_s"] >= 600


def test_what_serve_yaml_says_goes_before_the_defaults() -> None:
    model = {
        "model_loading_config": {"model_id": "m"},
        "engine_kwargs": {"max_num_seqs": 3},
        "deployment_config": {
            "num_replicas": 1,
            "max_queued_requests": 9,
            "ray_actor_options": {"num_cpus": 2},
        },
        "runtime_env": {"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "7"}},
    }
    given = {"llm_configs": [model], "ingress_deployment_config": {"num_replicas": 5}}
    args = with_defaults(given)
    (made,) = args["llm_configs"]
    assert made["deployment_config"]["max_ongoing_requests"] == 3
    assert made["deployment_config"]["max_queued_requests"] == 9
    assert "autoscaling_config" not in made["deployment_config"]
    assert made["deployment_config"]["ray_actor_options"]["num_cpus"] == 2
    assert made["runtime_env"]["env_vars"]["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert args["ingress_deployment_config"]["num_replicas"] == 5


@pytest.mark.parametrize(
    ("most", "given", "aimed_at"), [(64, {}, 32), (1, {}, 1), (64, {"target_ongoing_requests": 4}, 4)]
)
def test_autoscaling_aims_at_half_of_a_replica_unless_told(
    most: int, given: dict[str, int], aimed_at: int
) -> None:
    model = {"engine_kwargs": {"max_num_seqs": most}, "deployment_config": {"autoscaling_config": given}}
    (made,) = with_defaults({"llm_configs": [model]})["llm_configs"]
    assert made["deployment_config"]["autoscaling_config"]["target_ongoing_requests"] == aimed_at


def test_compose_mounts_files_that_are_there() -> None:
    (compose,) = documents("compose/compose.yaml")
    services = compose["services"]
    assert {services[name]["image"] for name in ("vllm", "ray")} == {IMAGE}
    for service in services.values():
        for volume in service.get("volumes", []):
            assert (SERVING / "compose" / volume.split(":")[0]).exists(), volume
    (scraped,) = documents("prometheus/prometheus.yml")
    targets = [t for job in scraped["scrape_configs"] for c in job["static_configs"] for t in c["targets"]]
    assert {target.split(":")[0] for target in targets} <= services.keys()
    for file in scraped["rule_files"]:
        assert (SERVING / "prometheus" / file).is_file()
    build = services["vllm"]["build"]
    assert (SERVING / "compose" / build["context"] / build["dockerfile"]).is_file()


def test_the_image_has_what_the_manifests_start() -> None:
    text = (SERVING / "container" / "Containerfile").read_text()
    assert "-march=native" not in text
    assert IMAGE in text
    sources = [
        *re.findall(r"^COPY (?!--from)(\S+)", text, re.MULTILINE),
        "clover_vllm/shipped/smollm2-135m-clover2",
    ]
    assert all((ROOT / source).exists() for source in sources)
    command = json.loads(re.search(r"^CMD (\[.*\])", text.replace("\\\n", ""), re.MULTILINE)[1])  # type: ignore[index]
    (container,) = by_kind("kubernetes/vllm-serve.yaml")["Deployment"]["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["args"][:3] == command[:3]
    for folder in ("/opt/clover/target", "/opt/clover/head"):
        assert folder in text
        assert folder in (SERVING / "ray" / "serve.yaml").read_text()


def our_names() -> set[str]:
    """Of Clover's metrics as `vllm serve` shows them."""
    keys = [*_counters(2, {}), *_histogram(2, {})]
    names = {json.loads(key)[1] for key in keys}
    return names | {"clover:tree_nodes_count"}


def test_alerts_name_metrics_that_exist() -> None:
    """vLLM's own are looked for in a real server by `test_the_dashboard_and_alerts_ask_for_metrics_that_exist`."""
    (file,) = documents("prometheus/alerts.yml")
    rules = [rule for group in file["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 4
    text = (SERVING / "prometheus" / "alerts.yml").read_text()
    asked = {found[0] for found in NAME.finditer(text)}
    assert {name for name in asked if name.startswith("clover:")} <= our_names()
    for rule in rules:
        expression = rule["expr"]
        assert expression.count("(") == expression.count(")")
        names = set(
            re.findall(r"(?<![\w:])[a-zA-Z_][\w:]*(?=[{\[])", re.sub(r"\{[^}]*\}(?=\[)", "", expression))
        )
        under_ray = {name for name in names if name.startswith("ray_")}
        plain = {found[0] for found in NAME.finditer(expression)}
        per_server = {"vllm:num_requests_running"}  # joins a server's own metrics to those of its process
        assert under_ray - {"ray_serve_deployment_replica_starts_total"} == {
            ray_name(n) for n in plain - per_server
        }
        assert names - under_ray - plain <= PROMETHEUS_OWN
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"].keys() == {"summary", "action"}
    assert '"serve_deployment_replica_starts"' in inspect.getsource(replica)


def test_the_dashboard_for_ray_is_the_other_ones_twin() -> None:
    plain, ray = (SERVING / "grafana" / f"clover{end}.json" for end in ("", "-ray"))
    assert ray.read_text() == for_ray(plain.read_text())
    assert not NAME.search(ray.read_text())
    ids = [json.loads(path.read_text())["uid"] for path in (plain, ray)]
    assert len(set(ids)) == 2
