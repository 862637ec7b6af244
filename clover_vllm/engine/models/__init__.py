"""Heads as vLLM models."""

ARCHITECTURES = {
    "Clover2DraftModel": "clover_vllm.engine.models.clover2:Clover2TreeHead",
    "Clover1DraftModel": "clover_vllm.engine.models.clover1:Clover1TreeHead",
    "MedusaTreesDraftModel": "clover_vllm.engine.models.medusa:MedusaTreeHead",
}
"""Where vLLM finds what a head's config.json names."""
