"""Heads as vLLM models."""

ARCHITECTURES = {
    "Clover2DraftModel": "clover_vllm.engine.models.clover2:Clover2DraftModel",
    "Clover1DraftModel": "clover_vllm.engine.models.clover1:Clover1DraftModel",
    "MedusaTreesDraftModel": "clover_vllm.engine.models.medusa:MedusaTreesDraftModel",
}
"""Where vLLM finds what a head's config.json names."""
