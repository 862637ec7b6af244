"""More and broader prompts for training, made by templates from the prompts and answers that are there.

Translation, retrieval from several passages, summaries, questions about long texts, changes to code, and second
turns. What is made depends on the material and the seed alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clover_vllm.base.prompts import Prompt

LANGUAGES = ("French", "German", "Spanish", "Italian", "Portuguese", "Dutch", "Polish", "Swedish")
_TRANSLATE = (
    "Translate into {language}:\n\n{text}",
    "Translate the following text to {language}.\n\n{text}",
    "How would you say this in {language}?\n\n{text}",
    "Give a {language} translation of the passage below.\n\n{text}",
    "{text}\n\nTranslate the text above into {language}.",
)
_TO_ENGLISH = (
    "Translate into English:\n\n{text}",
    "What does this say in English?\n\n{text}",
    "Give the English translation of this {language} text.\n\n{text}",
    "{text}\n\nTranslate the {language} text above into English.",
)
_ASK = (
    "{passages}\n\nUsing only the passages above, answer this question: {question}",
    "Answer the question from the documents below.\n\n{passages}\n\nQuestion: {question}",
    "Context:\n\n{passages}\n\n{question} Quote the sentence that tells you.",
    "{passages}\n\n{question} Answer in one or two sentences, and name the passage.",
)
_WHICH = (
    '{passages}\n\nWhich passage says the following, and what else does it say?\n\n"{sentence}"',
    '{passages}\n\nFind the passage that contains this sentence and summarise it: "{sentence}"',
    "{passages}\n\nWhat is passage {number} about?",
    "{passages}\n\nRepeat the main facts of passage {number}.",
)
_SUMMARISE = (
    "Summarize the text below in three sentences.\n\n{text}",
    "List the most important points of this text.\n\n{text}",
    "{text}\n\nTL;DR:",
    "Write a short abstract of the following text.\n\n{text}",
    "Explain the following text to a ten-year-old.\n\n{text}",
    "{text}\n\nSummarise the text above in one paragraph, and suggest a title.",
)
_CODE = (
    "Add comments to this code that explain each step.",
    "Rewrite this code with clearer names, and handle wrong input.",
    "Add a docstring and type hints.",
    "Rewrite it so that it is faster, and say why.",
    "Write unit tests for this code.",
    "Explain what this code does, line by line.",
    "Change the function so that it also prints its result.",
)
_FOLLOW_UP = (
    "Can you explain that in simpler words?",
    "Summarize your answer in one sentence.",
    "Give me an example.",
    "Why is that?",
    "Rewrite your answer as a list of bullet points.",
    "Are you sure? Check your answer step by step.",
    "Tell me more about the last point.",
    "Translate your answer into {language}.",
    "What would be the arguments against it?",
    "Make it shorter and more formal.",
)
_OF_LANGUAGE = re.compile(r"(?:from|Translate|following) (?P<language>[A-Z]\w+) (?:to|sentence into) English")
_CODE_BLOCK = re.compile(r"```[^\n]*\n(.{40,1500}?)```", re.DOTALL)


@dataclass(frozen=True)
class Exchange:
    """A prompt and the target's answer to it."""

    prompt: Prompt
    answer: str


@dataclass
class _Material:
    passages: list[str]
    asked: list[tuple[str, str]]  # passage, question about it
    foreign: dict[str, list[str]]  # sentences by language
    exchanges: list[Exchange]
    code: list[str]


def make_tasks(
    prompts: Sequence[Prompt], exchanges: Sequence[Exchange], count: int, seed: int
) -> list[Prompt]:
    """Prompts of all families in turn, without repetition.

    Args:
        prompts: to take passages, questions and sentences from; held-out ones give nothing.
        exchanges: to take second turns and code from; held-out ones give nothing either.
        count: of prompts to make; fewer where the material gives no more.
        seed: of what is drawn.
    """
    rng = random.Random(seed)
    material = _material(
        [p for p in prompts if not p.held_out], [e for e in exchanges if not e.prompt.held_out]
    )
    families = [(name, make) for name, make in _FAMILIES.items() if make(material, rng)]
    made: dict[str, Prompt] = {}
    for tries in range(3 * count if families else 0):
        if len(made) == count:
            break
        name, make = families[tries % len(families)]
        prompt = Prompt(f"task_{name}", make(material, rng))
        if not prompt.held_out:
            made.setdefault(prompt.text, prompt)
    return list(made.values())


def _material(prompts: Sequence[Prompt], exchanges: Sequence[Exchange]) -> _Material:
    found = _Material([], [], {}, [e for e in exchanges if 20 <= len(e.answer) <= 1500], [])
    for prompt in prompts:
        text = prompt.text
        if language := _OF_LANGUAGE.search(text):
            sentence = re.split(r"English\W*\n+|English: ", text, maxsplit=1)[-1].strip()
            found.foreign.setdefault(language["language"], []).append(sentence)
        elif passage := _passage(text):
            found.passages.append(passage)
            found.asked += [(passage, question) for question in _questions(text, passage)]
    for exchange in exchanges:
        found.code += _CODE_BLOCK.findall(exchange.answer)
    return found


def _passage(text: str) -> str | None:
    """The prose that a prompt quotes, without the words around it."""
    longest = max(re.split(r"\n+", text), key=len)
    longest = re.sub(r"^(Context|Passage|Text|Article|Bio)\W+", "", longest).strip().strip('"')
    if not 250 <= len(longest) <= 2500 or longest.count(". ") < 2 or "{" in longest or "?" in longest:
        return None  # a problem or a program rather than a passage
    return longest


def _questions(text: str, passage: str) -> Iterator[str]:
    for line in text.replace(passage, "\n").split("\n"):
        if 15 <= len(line) <= 160 and line.endswith("?") and ":" not in line:
            yield line.strip()


def _sentences(passage: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?]) +", passage) if len(s) >= 30]


def _one_turn(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _translation(m: _Material, rng: random.Random) -> list[dict[str, Any]]:
    if not m.passages:
        return []
    sentences = _sentences(rng.choice(m.passages))
    count = rng.randint(1, 3)
    start = rng.randrange(max(1, len(sentences) - count + 1))
    text = " ".join(sentences[start : start + count])
    return _one_turn(rng.choice(_TRANSLATE).format(language=rng.choice(LANGUAGES), text=text))


def _into_english(m: _Material, rng: random.Random) -> list[dict[str, Any]]:
    if not m.foreign:
        return []
    language = rng.choice(sorted(m.foreign))
    text = " ".join(rng.choices(m.foreign[language], k=rng.randint(1, 3)))
    return _one_turn(rng.choice(_TO_ENGLISH).format(language=language, text=text))


def _numbered(passages: Sequence[str]) -> str:
    return "\n\n".join(f"Passage {i}: {passage}" for i, passage in enumerate(passages, 1))


def _retrieval(m: _Material, rng: random.Random) -> list[dict[str, Any]]:
    if not m.asked:
        return []
    passage, question = rng.choice(m.asked)
    passages = [passage, *rng.choices(m.passages, k=rng.randint(1, 5))]
    rng.shuffle(passages)
    return _one_turn(rng.choice(_ASK).format(passages=_numbered(passages), question=question))


def _which(m: _Material, rng: random.Random) -> list[dict[str, Any]]:
    if not m.passages:
        return []
    passages = rng.choices(m.passages, k=rng.randint(2, 5))
    number = rng.randint(1, len(passages))
    sentence = rng.choice(_sentences(passages[number - 1]) or [passages[number - 1]])
    return _one_turn(
        rng.choice(_WHICH).format(passages=_numbered(passages), number=number, sentence=sentence)
    )


def _summary(m: _Material, rng: random.Random) -> list[dict[str, Any]]:
    if not m.passages:
        return []
    text = "\n\n".join(rng.choices(m.passages, k=rng.randint(1, 3)))
    return _one_turn(rng.choice(_SUMMARISE).format(text=text))


def _code_change(m: _Material, rng: random.Random) -> list[dict[str, Any]]:
    if not m.code:
        return []
    return _one_turn(f"{rng.choice(_CODE)}\n\n```\n{rng.choice(m.code).rstrip()}\n```")


def _second_turn(m: _Material, rng: random.Random) -> list[dict[str, Any]]:
    if not m.exchanges:
        return []
    exchange = rng.choice(m.exchanges)
    asked = rng.choice(_CODE if "```" in exchange.answer else _FOLLOW_UP)
    return [
        *exchange.prompt.messages,
        {"role": "assistant", "content": exchange.answer},
        {"role": "user", "content": asked.format(language=rng.choice(LANGUAGES))},
    ]


_FAMILIES: dict[str, Callable[[_Material, random.Random], list[dict[str, Any]]]] = {
    "translation": _translation,
    "into_english": _into_english,
    "retrieval": _retrieval,
    "which_passage": _which,
    "summary": _summary,
    "code_change": _code_change,
    "second_turn": _second_turn,
}
