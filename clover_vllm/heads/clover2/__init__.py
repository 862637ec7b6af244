"""The Clover-2 draft head (arXiv 2408.00264): configuration, reference model, checkpoints."""

from clover_vllm.heads.clover2.config import Clover2Config
from clover_vllm.heads.clover2.model import Clover2DraftModel

__all__ = ["Clover2Config", "Clover2DraftModel"]
