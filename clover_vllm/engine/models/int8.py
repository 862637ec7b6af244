"""The head's products in int8, with vLLM's own kernel for CPUs.

A few rows go through all of the head's weights, so drafting takes as long as reading those from memory does: half as
long in bytes. Weights have a scale per output channel, inputs one per row. Drafts may differ in a token now and then,
text never does.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.platforms import current_platform


class Int8Linear:
    """A product with fixed weights; called as vLLM's `cpu_linear` of a layer."""

    def __init__(self, weight: torch.Tensor) -> None:
        """weight: [N, K], copied."""
        self._size = weight.shape[0]
        scales = weight.float().abs().amax(1).clamp(min=1e-10) / 127.0
        quantised = (weight.float() / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        self._scales = scales  # the kernel reads them where they lie
        self._handler = ops.create_onednn_scaled_mm(quantised.t(), scales, weight.dtype, True, False)

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x: [..., K] -> [..., N]; `weight` is not used."""
        del weight
        rows = x.reshape(-1, x.shape[-1])
        quantised, scales, _ = ops.onednn_scaled_int8_quant(rows)
        out = torch.empty(rows.shape[0], self._size, dtype=x.dtype, device=x.device)
        if bias is not None:
            bias = bias.to(x.dtype)  # vLLM keeps it in float32 for its AMX kernels
        ops.onednn_scaled_mm(self._handler, quantised, out, scales, None, None, bias)
        return out.view(*x.shape[:-1], self._size)


def is_int8_quicker(precision: str, dtype: torch.dtype) -> bool:
    """Whether the head's products shall be in int8.

    Args:
        precision: the option `head_precision`.
        dtype: of the engine.
    """
    able = current_platform.is_cpu() and ops._supports_onednn and hasattr(torch.ops._C, "onednn_scaled_mm")
    return precision == "int8" and able and dtype in (torch.bfloat16, torch.float16)


def int8_linears(model: nn.Module) -> dict[nn.Module, Int8Linear]:
    """For all unquantised layers of a model whose weights have been loaded; vLLM repacks those afterwards."""
    return {
        layer: Int8Linear(layer.weight)
        for layer in model.modules()
        if isinstance(layer, LinearBase) and isinstance(layer.quant_method, UnquantizedLinearMethod)
    }
