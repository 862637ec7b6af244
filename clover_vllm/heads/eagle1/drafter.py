"""Drafting with the reference EAGLE-1 head, from many positions of one sequence at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from clover_vllm.heads.base import DraftTables
from clover_vllm.heads.layers import DecoderLayer

if TYPE_CHECKING:
    from clover_vllm.heads.eagle1.model import Eagle1DraftModel


@dataclass
class Eagle1Prefix:
    """An EAGLE-1 head's work on a known sequence, shared by all drafters on it (filled by `of`)."""

    keys: torch.Tensor  # [kv heads, T, K]
    values: torch.Tensor  # [kv heads, T, K]
    features: torch.Tensor  # [T, D], predicted

    @classmethod
    def of(cls, head: Eagle1DraftModel, features: torch.Tensor, embeds: torch.Tensor) -> Eagle1Prefix:
        """features: [T, D], post-norm states; embeds: [T, D], of the tokens one further on."""
        cache = head.new_cache()
        out = head(features[None], embeds[None], cache)[0]
        keys, values = cache[0].keys, cache[0].values
        assert keys is not None
        assert values is not None
        return cls(keys[0], values[0], out)


class Eagle1Drafter:
    """A `tree.Drafter`.

    A node's key and value join those of the positions up to its root, and of its own path.
    """

    def __init__(
        self, head: Eagle1DraftModel, prefix: Eagle1Prefix, rows: torch.Tensor, tables: DraftTables
    ) -> None:
        """
        Args:
            head: the reference model.
            prefix: its work on the sequence.
            rows: int64 [R], positions to draft from.
            tables: of the target.
        """
        self._head = head
        self._tables = tables
        self._keys, self._values = prefix.keys, prefix.values
        self._rows = rows
        self._features = prefix.features[rows, None]  # [R, slots, D]
        requests = len(rows)
        # Slots' own keys and values, and which slots lie on a slot's path (the root adds nothing:
        # its key is among the prefix's).
        self._slot_keys = self._keys.new_zeros(requests, self._keys.shape[0], 1, self._keys.shape[2])
        self._slot_values = torch.zeros_like(self._slot_keys)
        self._paths = torch.zeros(requests, 1, 1, dtype=torch.bool, device=rows.device)
        self._depths = torch.zeros(requests, 1, dtype=torch.int64, device=rows.device)

    def first(self, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._tables.score(self._features[:, 0], num_candidates)

    def expand(
        self, parent_slots: torch.Tensor, tokens: torch.Tensor, num_candidates: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        requests, w = parent_slots.shape
        old = self._features.shape[1]
        index = parent_slots[..., None].expand(requests, w, self._features.shape[-1])
        embeds = F.embedding(tokens, self._tables.embed).to(self._features.dtype)
        x = self._head.fc(torch.cat([embeds, self._features.gather(1, index)], dim=-1))
        depths = self._depths.gather(1, parent_slots) + 1
        layer = self._head.layers[0]
        assert isinstance(layer, DecoderLayer)
        attention = layer.self_attn
        cos, sin = self._head.rotary(self._rows[:, None] + depths)
        q, k, v = attention.project(x, cos, sin)
        slots = torch.arange(old, old + w, device=tokens.device)
        own = F.one_hot(slots, old + w).bool().expand(requests, w, old + w)
        parent_paths = F.pad(self._paths.gather(1, parent_slots[..., None].expand(requests, w, old)), (0, w))
        paths = parent_paths | own
        self._slot_keys = torch.cat([self._slot_keys, k], dim=2)
        self._slot_values = torch.cat([self._slot_values, v], dim=2)
        self._paths = torch.cat([F.pad(self._paths, (0, w)), paths], dim=1)
        self._depths = torch.cat([self._depths, depths], dim=1)
        x = x + attention.o_proj(self._attend(attention.num_groups, q, paths))
        out = x + layer.mlp(layer.post_attention_layernorm(x))
        self._features = torch.cat([self._features, out], dim=1)
        return self._tables.score(out, num_candidates)

    def _attend(self, groups: int, q: torch.Tensor, paths: torch.Tensor) -> torch.Tensor:
        """Attention of new nodes over the positions up to their roots, and over their own paths.

        The positions' keys are all requests' and are read in place: with long prompts a copy for each would cost more
        than all the rest.

        Args:
            groups: query heads per kv head.
            q: [R, H, W, K], rotated queries.
            paths: bool [R, W, slots], the slots on each node's path.

        Returns:
            [R, W, H * K].
        """
        requests, heads, w, channels = q.shape
        q = q.reshape(requests, heads // groups, groups * w, channels) * channels**-0.5
        positions = torch.arange(self._keys.shape[1], device=q.device)
        later = (positions > self._rows[:, None])[:, None, None]  # [R, 1, 1, T]
        by_kv_head = q.transpose(0, 1).flatten(1, 2)  # [kv heads, R * groups * W, K]
        prefix = (by_kv_head @ self._keys.transpose(1, 2)).unflatten(1, (requests, -1)).transpose(0, 1)
        own = q @ self._slot_keys.transpose(2, 3)  # [R, kv heads, groups * W, slots]
        off_path = ~paths.repeat(1, groups, 1)[:, None]
        scores = [prefix.masked_fill(later, -torch.inf), own.masked_fill(off_path, -torch.inf)]
        weights = torch.cat(scores, dim=3).softmax(dim=-1)
        on_prefix, on_path = weights.split([prefix.shape[3], own.shape[3]], dim=3)
        out = (on_prefix.transpose(0, 1).flatten(1, 2) @ self._values).unflatten(1, (requests, -1))
        out = out.transpose(0, 1) + on_path @ self._slot_values
        return out.reshape(requests, heads, w, channels).transpose(1, 2).flatten(2)
