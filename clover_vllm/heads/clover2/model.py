"""Reference Clover-2 head in plain PyTorch (arXiv 2408.00264).

One set of weights, two forms of use that agree:

* teacher-forced over whole sequences (`augment` without a cache, then `draft_states`), for training;
* step by step with a key/value cache (`augment` with a cache, `first`, then `advance` per draft
  level), for drafting.

Legend for shape suffixes in comments: B sequences, T positions, D hidden size, H attention heads,
K channels per head, N rows of any kind. Parameter names are the published checkpoint's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from clover_vllm.heads.base import DraftTables, NewHead, Prefix, TeacherForced
from clover_vllm.heads.clover2.config import Clover2Config
from clover_vllm.heads.clover2.drafter import Clover2Drafter
from clover_vllm.heads.layers import DecoderLayer, KVCache, RMSNorm, Rotary
from clover_vllm.heads.saved import SavedHead

if TYPE_CHECKING:
    from clover_vllm.target.frozen import FrozenTarget


class ResAttentionBlock(nn.Module):
    """Adds `y` to `x`, gated per head by the cosine similarity of a query of x and a key of y.

    The paper's "attentive regression" applied as an input mixer and as the recurrent cell.
    """

    def __init__(self, config: Clover2Config) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.eps = config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.q = nn.Linear(size, size)
        self.k = nn.Linear(size, size)
        self.v = nn.Linear(size, size)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x, y: [..., D] -> [..., D]."""
        per_head = (*x.shape[:-1], self.num_heads, -1)
        q = self.q(self.input_layernorm(x)).view(per_head)
        k = self.k(y).view(per_head)
        v = self.v(y).view(per_head)
        gate = F.cosine_similarity(q.float(), k.float(), dim=-1, eps=self.eps).to(v.dtype)
        return x + (gate.unsqueeze(-1) * v).reshape(x.shape).to(x.dtype)


class LayerMixer(nn.Module):
    """Adds what earlier layers of the target know to its last hidden state: each is normed, one projection mixes them."""

    def __init__(self, config: Clover2Config) -> None:
        super().__init__()
        size, count = config.hidden_size, len(config.target_layers)
        self.norms = nn.ModuleList(RMSNorm(size, config.rms_norm_eps) for _ in range(count))
        self.mix = nn.Linear(count * size, size, bias=False)

    def forward(self, hidden: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """hidden: [..., (1 + layers) D], of which the last D are not read; last: [..., D] -> [..., D]."""
        parts = hidden.split(last.shape[-1], dim=-1)
        known = [norm(part) for norm, part in zip(self.norms, parts[:-1], strict=True)]
        return last + self.mix(torch.cat(known, dim=-1))


class Clover2DraftModel(SavedHead):
    """The Clover-2 head. Carries neither lm_head nor embeddings: they are the target's.

    Inputs at position t are h_t, the target's last hidden state *before* its final norm, and
    e_{t+1}, the row of the target's **lm_head** for the token at t + 1. `draft_states` row t of
    head i is the normed state whose lm_head logits predict token t + 2 + i.
    """

    config: Clover2Config
    config_class = Clover2Config
    title = "Clover-2"

    def __init__(self, config: Clover2Config) -> None:
        super().__init__(config)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.clover_norm = RMSNorm(size, eps)
        if config.target_layers:
            self.clover_mixer = LayerMixer(config)
        self.clover_head_mlp_rnn = ResAttentionBlock(config)
        self.clover_head_mlp_rnn2 = ResAttentionBlock(config)
        self.clover_head_mlp = nn.Linear(size, size)
        self.clover_head_mlp2 = nn.Linear(2 * size, size)
        self.clover_head_norm = RMSNorm(size, eps)
        if config.norm_state:
            self.clover_head_state_norm = RMSNorm(size, eps)
        self.rotary = Rotary(config)

    def new_cache(self) -> list[KVCache]:
        """An empty key/value cache, one entry per augmenting layer."""
        return [KVCache() for _ in self.layers]

    def augment(
        self,
        hidden: torch.Tensor,
        embeds: torch.Tensor,
        cache: Sequence[KVCache] | None = None,
    ) -> torch.Tensor:
        """The augmenting block, paper section 3: mix in the token, then causal layers.

        Args:
            hidden: [B, T, (1 + target layers) D], the target's hidden states: what enters `target_layers`,
                then the pre-norm h_t.
            embeds: [B, T, D], unscaled lm_head rows of the tokens at t + 1.
            cache: from `new_cache`, when the positions continue an earlier call; grown in place.

        Returns:
            g, [B, T, D].
        """
        past = cache[0].length if cache else 0
        positions = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        cos, sin = self.rotary(positions)
        last = hidden[..., -self.config.hidden_size :] * self.config.hidden_scale
        if self.config.target_layers:
            last = self.clover_mixer(hidden, last)
        x = self.clover_head_mlp_rnn(last, embeds * self.config.embed_scale)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache[index] if cache else None)
        return self.clover_norm(x)

    def first(self, g: torch.Tensor) -> torch.Tensor:
        """Head 0: s_0 [..., D] from the augmenting output g [..., D], which is also r_0."""
        return self.clover_head_norm(self.clover_head_mlp(g))

    def advance(self, r: torch.Tensor, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft level.

        Args:
            r: [..., D], the recurrent state r_{i-1} of the parent nodes.
            embeds: [..., D], unscaled lm_head rows of the tokens at those nodes.

        Returns:
            r_i and s_i, each [..., D].
        """
        e = embeds * self.config.embed_scale
        r = self.clover_head_mlp_rnn2(r, e)
        if self.config.norm_state:
            r = self.clover_head_state_norm(r)
        return r, self.clover_head_norm(self.clover_head_mlp2(torch.cat([r, e], dim=-1)))

    def draft_states(self, g: torch.Tensor, next_embeds: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Teacher-forced states of every head.

        Args:
            g: [N, D], augmenting outputs.
            next_embeds: for head i = 1, 2, ... the [N, D] lm_head rows of the tokens at t + 1 + i.

        Returns:
            s_0, s_1, ..., each [N, D].
        """
        states, r = [self.first(g)], g
        for embeds in next_embeds:
            r, s = self.advance(r, embeds)
            states.append(s)
        return states

    @property
    def num_heads(self) -> int:
        return self.config.num_heads

    @property
    def target_layers(self) -> Sequence[int]:
        return self.config.target_layers

    @staticmethod
    def embeddings_of(target: FrozenTarget) -> torch.Tensor:
        return target.lm_head

    def trained_states(self, batch: TeacherForced) -> torch.Tensor:
        ids = batch.token_ids
        embeds = F.embedding(ids[:, 1:], batch.embed)
        g = batch.rows(self.augment(batch.hidden[:, :-1], embeds))
        flat = ids.flatten()
        last = len(flat) - 1
        nexts = [
            F.embedding(flat[(batch.source + 1 + i).clamp(max=last)], batch.embed)
            for i in range(1, self.num_heads)
        ]
        return torch.stack([s.float() for s in self.draft_states(g, nexts)])

    def drafters(self, prefix: Prefix, tables: DraftTables) -> Callable[[torch.Tensor], Clover2Drafter]:
        g = self.augment(prefix.hidden[None], prefix.embeds[None])[0]
        return lambda rows: Clover2Drafter(self, g[rows], tables)

    @classmethod
    def new(cls, target: FrozenTarget, wanted: NewHead) -> Clover2DraftModel:
        from clover_vllm.heads.clover2.init import config_for_new, init_from_target

        head = cls(config_for_new(target, wanted))
        init_from_target(head, target.layers, target.norm, wanted.seed)
        head.draft_vocab = wanted.draft_vocab
        return head
