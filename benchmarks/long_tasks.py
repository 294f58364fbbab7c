"""RULER and BABILong in lm-evaluation-harness at any length, without a download.

What the harness would fetch is made of one text: the essays that needles are hidden in, the rules by which nltk
cuts sentences, and the stories of BABILong's first question, drawn as bAbI's are and hidden in the text.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.harness import measure_tasks, require_harness
from converter.lengths import format_length

NEEDLES = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1")
# The example in their prompts takes half of this; where it leaves no room, the harness searches without end.
WITH_EXAMPLES, SHORTEST = ("ruler_vt", "ruler_cwe"), 1024
BABILONG = "babilong_qa1"
PEOPLE = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("bathroom", "hallway", "garden", "office", "bedroom", "kitchen")
MOVES = ("moved to the", "went to the", "journeyed to the", "travelled to the", "went back to the")
ESSAYS, STORIES = "baber/paul_graham_essays", "RMT-team/babilong-1k-samples"
# Characters of the harness's instructions and examples around a story; tokens of an answer.
FRAME, ANSWER = 950, 16


def measure_long_tasks(
    model: Any,
    tokenizer: Any,
    text: str,
    lengths: Sequence[int],
    *,
    limit: int,
    seed: int,
    window: int | None = None,
) -> list[dict[str, Any]]:
    """Scores of RULER's tasks and BABILong's first question: one dict a task and length.

    Args:
        text: what facts are hidden in.
        limit: prompts a task and length.
        window: tokens at a prompt's end that the model reads; all by default.

    Raises:
        CalibrationError: the harness, or a package of its extra ``ruler``, is not installed.
    """
    require_harness("nltk", "wonderwords")
    scores = []
    with tempfile.TemporaryDirectory() as folder, _made_inputs(Path(folder), tokenizer, text, lengths, limit, seed):
        for length in lengths:
            ruler = NEEDLES + (WITH_EXAMPLES if length >= SHORTEST else ())
            for tasks in (ruler, (BABILONG,)):
                for found in measure_tasks(
                    model, tokenizer, tasks, max_length=length, window=window, limit=limit, seed=seed
                ):
                    share = found.metrics.get("acc", found.metrics.get(str(length)))
                    scores.append({"task": found.task, "length": length, "samples": found.samples, "score": share})
    return scores


@contextlib.contextmanager
def _made_inputs(
    folder: Path, tokenizer: Any, text: str, lengths: Sequence[int], count: int, seed: int
) -> Iterator[None]:
    """Write what the harness would download, and work where it is found in place of the Hub."""
    import datasets
    import nltk
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    write_rows(folder / ESSAYS / "train.jsonl", [{"text": text}])
    parts = []
    for length in lengths:
        name = format_length(length)
        write_rows(folder / STORIES / f"{name}.jsonl", draw_stories(tokenizer, text, length, count, seed))
        parts.append({"config_name": name, "data_files": [{"split": "qa1", "path": f"{name}.jsonl"}]})
    (folder / STORIES / "README.md").write_text(f"---\nconfigs: {json.dumps(parts)}\n---\n")
    rules = folder / "tokenizers" / "punkt_tab" / "english"
    rules.mkdir(parents=True, mode=0o700)
    nltk.data.path.insert(0, str(folder))
    save_punkt_params(PunktTrainer(text).get_params(), str(rules))
    # Imported here: it looks for the rules as it is imported, and would fetch them.
    from lm_eval.tasks.ruler import prepare_niah

    make = prepare_niah.generate_samples
    try:
        with (
            mock.patch.object(datasets.config, "HF_DATASETS_CACHE", folder / "cache"),
            # The harness makes 500 prompts of each needle, however few are asked: minutes at 16k.
            mock.patch.object(
                prepare_niah,
                "generate_samples",
                lambda *given, **named: make(*given, **named | {"num_samples": count}),
            ),
            contextlib.chdir(folder),
        ):
            yield
    finally:
        nltk.data.path.remove(str(folder))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def draw_stories(tokenizer: Any, text: str, length: int, count: int, seed: int) -> list[dict[str, str]]:
    """Stories of bAbI's first task, 2 to 10 sentences, hidden in text that fills a prompt of ``length`` tokens.

    Returns:
        ``input``, ``question`` and ``target`` of each; without text where the story leaves no room.
    """
    generator, rows = random.Random(f"{seed} {length}"), []
    sentences = re.split(r"(?<=[.!?])\s+", text)
    frame = len(tokenizer(text[:FRAME]).input_ids) + ANSWER
    for _ in range(count):
        moves = [(generator.choice(PEOPLE), generator.choice(PLACES)) for _ in range(2 * generator.randint(1, 5))]
        story = [f"{person} {generator.choice(MOVES)} {place}." for person, place in moves]
        asked = generator.choice(moves)[0]
        room = length - frame - len(tokenizer(" ".join(story)).input_ids)
        start, hay = generator.randrange(len(sentences)), []
        while room > 0:
            hay.append(sentences[(start + len(hay)) % len(sentences)])
            room -= len(tokenizer(" " + hay[-1]).input_ids)
        hay = hay[:-1]
        places = sorted(generator.randint(0, len(hay)) for _ in story)
        for told, (place, fact) in enumerate(zip(places, story, strict=True)):
            hay.insert(place + told, fact)
        rows.append({"input": " ".join(hay), "question": f"Where is {asked}? ", "target": dict(moves)[asked]})
    return rows
