"""Prompts made by templates are the same each time, of every family, and take nothing from held-out prompts."""

from __future__ import annotations

from collections import Counter

from clover_vllm.base.prompts import Prompt
from clover_vllm.train.tasks import Exchange, make_tasks


def prompt(text: str) -> Prompt:
    return Prompt("x", [{"role": "user", "content": text}])


def passage(topic: str) -> str:
    return " ".join(f"Sentence number {i} says something long enough about {topic}." for i in range(8))


PROMPTS = [
    *(prompt(f"Context: {passage(f'topic {i}')}\n\nWhat is known about topic {i}?") for i in range(150)),
    *(prompt(f"Translate German to English: Satz {i} ist auf Deutsch.") for i in range(100)),
]
EXCHANGES = [
    Exchange(prompt(f"Write program {i}."), f"Here it is:\n```python\nprint({i})  # {'x' * 40}\n```")
    for i in range(100)
]


def test_tasks_are_of_every_family_and_depend_on_the_seed_alone() -> None:
    made = make_tasks(PROMPTS, EXCHANGES, 210, seed=3)
    assert made == make_tasks(PROMPTS, EXCHANGES, 210, seed=3)
    assert made != make_tasks(PROMPTS, EXCHANGES, 210, seed=4)
    counts = Counter(p.source for p in made)
    assert len(counts) == 7
    assert min(counts.values()) >= 20
    assert len({p.text for p in made}) == len(made) == 210
    assert any(len(p.messages) == 3 for p in made)


def test_held_out_prompts_give_nothing() -> None:
    held_out = {p.text.split("\n")[0].removeprefix("Context: ") for p in PROMPTS if p.held_out}
    assert held_out
    made = make_tasks(PROMPTS, EXCHANGES, 300, seed=0)
    assert not any(p.held_out for p in made)
    assert not any(text in p.text for p in made for text in held_out)


def test_without_material_nothing_is_made() -> None:
    assert make_tasks([prompt("Hello")], [], 10, seed=0) == []
