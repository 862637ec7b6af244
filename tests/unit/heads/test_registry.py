"""Every method keeps the promises of `heads.base.Head`, and unknown ones are named."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from small import one_sentence

from clover_vllm.base.errors import UserError
from clover_vllm.engine.models import ARCHITECTURES
from clover_vllm.heads.base import DraftTables, Head, NewHead, Prefix, TeacherForced
from clover_vllm.heads.registry import HEADS, TREE_HEADS, HeadKind, head_kind, kind_of
from clover_vllm.heads.saved import SavedHead
from clover_vllm.target.frozen import FrozenTarget

VOCAB = torch.arange(3, 90)


EVERY_HEAD: list[tuple[str, dict[str, object]]] = [(method, {}) for method in HEADS]
EVERY_HEAD.append(("clover2", {"norm_state": True, "target_layers": [0, 1], "num_hidden_layers": 1}))


def new_head(kind: HeadKind, frozen: FrozenTarget, **fields: object) -> Head:
    ids = torch.randint(3, 211, (1, 20), generator=torch.Generator().manual_seed(0))
    hidden = frozen.hidden_states(ids)[0]
    return kind.head_class().new(frozen, NewHead(5, VOCAB, hidden, ids[0], True, 0, fields))


@pytest.mark.parametrize(("method", "fields"), EVERY_HEAD)
def test_a_saved_head_is_found_by_its_config(
    method: str, fields: dict[str, object], frozen: FrozenTarget, tmp_path: Path
) -> None:
    head = new_head(HEADS[method], frozen, **fields).to(torch.bfloat16)
    head.save(tmp_path / "head", frozen.path)
    kind = kind_of(tmp_path / "head")
    assert kind is HEADS[method]
    again = kind.head_class().load(tmp_path / "head")
    assert type(again) is type(head)
    assert again.state_dict().keys() == head.state_dict().keys()
    for name, tensor in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(again.state_dict()[name].dtype)), name
    assert (again.draft_vocab is not None) == head.saves_draft_vocab


@pytest.mark.parametrize(("method", "fields"), EVERY_HEAD)
def test_drafters_predict_what_training_teaches(
    method: str, fields: dict[str, object], frozen: FrozenTarget
) -> None:
    """Depth by depth, drafting along a known answer gives the teacher-forced states' tokens."""
    head = new_head(HEADS[method], frozen, **fields)
    torch.manual_seed(1)
    for parameter in head.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    ids = torch.randint(3, 90, (1, 14))
    hidden = frozen.hidden_states(ids, head.target_layers)
    post_norm = frozen.norm(hidden[..., -128:])
    embed = head.embeddings_of(frozen)
    tables = DraftTables(embed, frozen.lm_head[VOCAB], VOCAB)
    source = torch.arange(3, 8)
    with torch.no_grad():
        states = head.trained_states(TeacherForced(ids, hidden, post_norm, embed, source))
        prefix = Prefix(hidden[0, :-1], post_norm[0, :-1], embed[ids[0, 1:]])
        drafter = head.drafters(prefix, tables)(source)
        assert states.shape == (head.num_heads, len(source), 128)
        drafted = drafter.first(4)
        for depth, state in enumerate(states):
            expected = tables.score(state, 4)
            torch.testing.assert_close(drafted[0].view(-1, 4), expected[0], atol=1e-5, rtol=1e-5)
            assert torch.equal(drafted[1].view(-1, 4), expected[1])
            slots = torch.full((len(source), 1), depth)
            if depth + 1 < len(states):
                drafted = drafter.expand(slots, ids[0, source + 2 + depth][:, None], 4)


def test_unknown_methods_are_refused_with_the_known_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'lookahead'.*clover2, clover1, medusa, eagle1") as caught:
        head_kind("lookahead")
    one_sentence(caught.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match=r"'gpt2'.*Clover-2.*EAGLE-1") as caught:
        kind_of(tmp_path)
    one_sentence(caught.value)


def test_a_new_head_is_an_entry_of_the_registry() -> None:
    """Who trains, evaluates and registers heads names none of them, in imports and strings."""
    package = Path(__file__).parents[3] / "clover_vllm"
    files = [*package.glob("train/*.py"), *package.glob("eval/*.py")]
    files += [package / "engine/plugin.py", package / "engine/config.py"]
    files.remove(package / "train/settings.py")  # has the default
    assert len(files) > 15
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            said = ""
            if isinstance(node, ast.ImportFrom):
                said = node.module or ""
            elif isinstance(node, ast.Constant) and id(node) not in texts:
                said = str(node.value)
            assert not [method for method in HEADS if method in said], (file, said)


def test_entries_of_heads_with_trees_name_what_vllm_needs() -> None:
    for model_type, kind in TREE_HEADS.items():
        head = kind.head_class()
        assert issubclass(head, SavedHead)
        assert head.config_class is kind.config_class()
        assert kind.config_class().model_type == model_type
        assert head.__name__ in ARCHITECTURES
        assert set(kind.shaped_by) <= vars(kind.config_class()()).keys()
