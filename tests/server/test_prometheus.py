"""A real Prometheus: rules, and what dashboards and alerts ask a server for. Needs Debian's package prometheus."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from run_ray import free_port

from clover_vllm.check.tiny import make_tiny_pair
from clover_vllm.launch.process import open_log
from clover_vllm.launch.server import Server

PROMETHEUS, PROMTOOL = shutil.which("prometheus") or "", shutil.which("promtool") or ""
pytestmark = pytest.mark.skipif(
    not (PROMETHEUS and PROMTOOL), reason="there is no prometheus or promtool (Debian's package prometheus)"
)
SERVING = Path(__file__).parents[2] / "serving"
RULES = SERVING / "prometheus"
FLAGS = ["--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "4", "--dtype", "float32"]
Json = dict[str, Any]


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROMTOOL, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_rules_and_configuration_are_accepted() -> None:
    for kind, file in (("rules", "alerts.yml"), ("config", "prometheus.yml")):
        done = promtool("check", kind, RULES / file)
        assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_come_when_they_should(tmp_path: Path) -> None:
    done = promtool("test", "rules", RULES / "alerts_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copy(RULES / "alerts_test.yml", tmp_path)
    changed = (RULES / "alerts.yml").read_text().replace("< 0.5 *", "< 0.05 *")
    (tmp_path / "alerts.yml").write_text(changed)
    assert "CloverAcceptanceFallen" in promtool("test", "rules", tmp_path / "alerts_test.yml").stderr


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    target, head = make_tiny_pair(tmp_path_factory.mktemp("pair"))
    with Server(str(target), {"model": str(head)}, FLAGS, "small") as running:
        running.wait(300)
        yield running


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Prometheus that asks the server every second."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((RULES / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES / "alerts.yml")]
    address = server.url.removeprefix("http://")
    config["scrape_configs"] = [{"job_name": "vllm", "static_configs": [{"targets": [address]}]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    url = f"127.0.0.1:{free_port()}"
    command = [PROMETHEUS, "--config.file", str(folder / "prometheus.yml"), "--web.listen-address", url]
    command += ["--storage.tsdb.path", str(folder / "data")]
    with open_log() as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield f"http://{url}/api/v1"
        finally:
            process.terminate()
            process.wait(20)


def ask(prometheus: str, query: str, after: float = 0) -> list[float]:
    """Values of all series now, or some seconds later."""
    params: Json = {"query": query, "time": time.time() + after}
    answer = httpx.get(f"{prometheus}/query", params=params).json()
    assert answer["status"] == "success", f"{query}: {answer}"
    return [float(series["value"][1]) for series in answer["data"]["result"]]


def panels(dashboard: str) -> list[str]:
    """Its queries, with Grafana's variables as it fills them in."""
    panels = json.loads((SERVING / "grafana" / dashboard).read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    filled = [q.replace("$model", "small").replace("$__rate_interval", "1m") for q in queries]
    assert "$" not in "".join(filled)
    return filled


def alerts() -> list[str]:
    """Their expressions, whose comparisons give 0 or 1 rather than leave out: a metric that is missing leaves nothing."""
    groups = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    rules = [rule["expr"] for group in groups for rule in group["rules"]]
    return [re.sub(r" ([<>]) ", r" \1 bool ", rule) for rule in rules]


def complete(server: Server) -> None:
    body = {"model": "small", "prompt": "the cat", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).raise_for_status()


def test_every_query_of_dashboard_and_alerts_is_answered(server: Server, prometheus: str) -> None:
    missing = [*panels("clover.json"), *alerts()]
    assert len(missing) > 14
    until = time.monotonic() + 60
    while missing and time.monotonic() < until:
        try:
            complete(server)
            time.sleep(1)
            # A subquery is evaluated twice a minute: half a minute later there has been one.
            missing = [query for query in missing if not any(map(math.isfinite, ask(prometheus, query, 30)))]
        except httpx.ConnectError:
            continue  # Prometheus is not there yet
    assert missing == []


def test_the_dashboards_variable_finds_the_model(prometheus: str) -> None:
    (variable,) = (
        v["query"]
        for v in json.loads((SERVING / "grafana" / "clover.json").read_text())["templating"]["list"]
        if v["type"] == "query"
    )
    metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable).groups()  # type: ignore[union-attr]
    answer = httpx.get(f"{prometheus}/label/{label}/values", params={"match[]": metric}).json()
    assert answer["data"] == ["small"]


def test_no_alert_of_a_new_server_fires_or_fails(prometheus: str) -> None:
    (group,) = httpx.get(f"{prometheus}/rules").json()["data"]["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    assert {rule["state"] for rule in group["rules"]} <= {"inactive", "pending"}


def test_queries_for_ray_are_understood(prometheus: str) -> None:
    """Their names are the other ones' (`test_the_dashboard_for_ray_is_the_other_ones_twin`); no Ray is scraped here."""
    for query in panels("clover-ray.json"):
        assert ask(prometheus, query) == []
