"""The Ray Serve application: `ray.serve.llm` with the defaults that suit Clover-2.

`serve run serving/ray/serve.yaml` calls `build`, whose arguments are those of `ray.serve.llm.build_openai_app`. What the
file says holds; the rest is filled in here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clover_vllm.cluster.settings import MOST_REQUESTS

LONGEST_ANSWER = 600.0
"""Seconds that a replica which leaves gives its requests; Ray's default of 20 cuts long answers."""

TARGET_SHARE = 0.5
"""Of the requests that a replica holds: autoscaling aims at it, and the rest takes what comes while a replica starts.
Ray's default for language models is a billion requests, with which the number of replicas never changes."""

DEPLOYMENT: dict[str, Any] = {
    "max_queued_requests": 256,  # then 503, rather than a queue without an end
    "health_check_period_s": 5,
    "health_check_timeout_s": 30,
    "graceful_shutdown_wait_loop_s": 1,
    "graceful_shutdown_timeout_s": LONGEST_ANSWER,
}
AUTOSCALING = {
    "min_replicas": 2,
    "max_replicas": 2,
    "upscale_delay_s": 10,
    "downscale_delay_s": 300,
}
INGRESS: dict[str, Any] = {
    "num_replicas": 2,
    "max_ongoing_requests": 1000,
    "graceful_shutdown_timeout_s": LONGEST_ANSWER,
    "ray_actor_options": {"num_cpus": 0},
}
"""Of the deployment that takes the requests in: it computes little, and two survive the loss of one."""


def build(args: Mapping[str, Any]) -> Any:
    """The application, for `import_path` of a Serve configuration."""
    from ray.serve.llm import build_openai_app

    return build_openai_app(with_defaults(args))


def with_defaults(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `build_openai_app`, completed."""
    made = dict(args)
    made["llm_configs"] = [_model(config) for config in args["llm_configs"]]
    made.setdefault("ingress_cls_config", {"ingress_cls": "clover_vllm.cluster.ingress:RetryingIngress"})
    made["ingress_deployment_config"] = _over(INGRESS, args.get("ingress_deployment_config", {}))
    return made


def _model(config: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(config)
    engine = dict(config.get("engine_kwargs", {}))
    engine.setdefault("max_num_seqs", MOST_REQUESTS)
    made["engine_kwargs"] = engine
    made.setdefault("server_cls", "clover_vllm.cluster.server:CloverServer")
    deployment = _over(
        {**DEPLOYMENT, "max_ongoing_requests": engine["max_num_seqs"]}, config.get("deployment_config", {})
    )
    if "num_replicas" not in deployment:
        target = max(1, int(TARGET_SHARE * deployment["max_ongoing_requests"]))
        deployment["autoscaling_config"] = _over(
            {**AUTOSCALING, "target_ongoing_requests": target}, deployment.get("autoscaling_config", {})
        )
    actor = _over({"num_cpus": 0}, deployment.get("ray_actor_options", {}))  # its bundle has the cores
    deployment["ray_actor_options"] = actor
    made["deployment_config"] = deployment
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "THP_MEM_ALLOC_ENABLE": "1"}
    runtime = dict(config.get("runtime_env") or {})
    made["runtime_env"] = runtime | {"env_vars": environment | runtime.get("env_vars", {})}
    return made


def _over(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {**defaults, **given}
