"""What engines on a cluster refuse reaches the user; how they share shards is in `tests/cluster/test_ray.py`."""

from __future__ import annotations

from clover_vllm.base.errors import UserError
from clover_vllm.cluster.generation import _refusal


def test_what_an_actor_refused_is_found_under_what_ray_wraps_around_it() -> None:
    refused = UserError("vLLM does not start with target x.")

    class Wrapped(UserError):
        """As ray.exceptions.RayTaskError makes them: of the cause's class too, with the whole traceback as text."""

        def __init__(self, cause: Exception) -> None:
            super().__init__("Traceback ...")
            self.cause = cause

    outer = RuntimeError("a user's function failed")
    outer.__cause__ = Wrapped(refused)
    assert _refusal(outer) is refused
    assert _refusal(RuntimeError("something else")) is None
