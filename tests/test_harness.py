"""lm-evaluation-harness on converted models, with a task that this test defines."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from benchmarks.harness import measure_tasks
from benchmarks.long_tasks import MOVES, draw_stories
from benchmarks.measures import app
from converter.commands.opening import HELD_OUT_NOVEL
from converter.errors import CalibrationError, UsageError
from converter.source import resolve
from tests.measured_models import ScriptedModel, demo_folder

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.models.huggingface", reason="needs the extra: pip install '.[harness]'")

KEYS = """\
task: local_keys
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{key}}}}"
generation_kwargs: {{max_gen_toks: {new_tokens}, do_sample: false, until: ["."]}}
filter_list:
  - name: digits
    filter: [{{function: regex, regex_pattern: "(\\\\d+)"}}, {{function: take_first}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""
WORDS = """\
task: local_words
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: " {{{{key}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    generator = random.Random(0)
    rows = []
    for _ in range(3):
        key = generator.randrange(10_000, 100_000)
        rows.append({"text": f"The pass key is {key}. Remember it. Answer:", "key": str(key)})
    data = folder / "keys.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "keys.yaml").write_text(KEYS.format(data=data, new_tokens=12))
    (folder / "words.yaml").write_text(WORDS.format(data=data))
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(resolve("demo", compose=True).folder)


def test_model_that_knows_the_answer_scores_full_marks(tasks: Path, tokenizer: Any) -> None:
    [score] = measure_tasks(
        ScriptedModel(tokenizer), tokenizer, ["local_keys"], max_length=256, task_folder=str(tasks)
    )
    assert score.metrics["exact_match"] == 1.0
    assert (score.task, score.samples, score.new_tokens, score.version) == ("local_keys", 3, 12, "2.0")


def test_answers_get_the_length_the_task_asks_for(tasks: Path, tokenizer: Any) -> None:
    data = tasks / "keys.jsonl"
    (tasks / "keys.yaml").write_text(KEYS.format(data=data, new_tokens=1))
    [score] = measure_tasks(
        ScriptedModel(tokenizer), tokenizer, ["local_keys"], max_length=256, task_folder=str(tasks)
    )
    assert score.new_tokens == 1 and score.metrics["exact_match"] == 0.0


def test_prompts_are_cut_to_the_length_asked_for(tasks: Path, tokenizer: Any) -> None:
    data = tasks / "keys.jsonl"
    filler = "It was a dark and stormy night. " * 400
    row = {"text": f"The pass key is 12345. {filler}Answer:", "key": "12345"}
    data.write_text(json.dumps(row) + "\n")
    model = ScriptedModel(tokenizer)
    scores = {}
    for length in (2048, 8192):
        [score] = measure_tasks(model, tokenizer, ["local_keys"], max_length=length, task_folder=str(tasks))
        scores[length] = score.metrics["exact_match"]
    assert scores == {2048: 0.0, 8192: 1.0}


def test_command_runs_a_converted_folder(tasks: Path, tmp_path: Path) -> None:
    folder = demo_folder("demo", tmp_path / "converted", factor=1.2)
    words = (
        "--harness",
        "local_keys",
        "--harness",
        "local_words",
        "--harness-path",
        str(tasks),
        "--lengths",
        "512",
        "--limit",
        "2",
    )
    result = CliRunner().invoke(app, [str(folder), "--task", "harness", *words, "--json", "-q"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout[result.stdout.index("{") :])
    assert record["task"] == "harness" and record["versions"]["lm-eval"]
    keys, words_score = record["scores"]
    assert keys["metrics"]["exact_match"] == 0.0 and keys["samples"] == 2
    assert words_score["metrics"]["perplexity"] > 1 and words_score["new_tokens"] is None


def test_harness_loads_a_converted_folder_by_itself(tasks: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = demo_folder("demo", tmp_path / "converted", factor=1.2)
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32", "max_length": 512},
        tasks=["local_words"],
        device="cpu",
        task_manager=TaskManager(include_path=str(tasks)),
        bootstrap_iters=0,
    )
    assert found is not None
    alone = found["results"]["local_words"]["perplexity,none"]
    words = ("--harness", "local_words", "--harness-path", str(tasks), "--lengths", "512")
    result = CliRunner().invoke(app, [str(folder), "--task", "harness", *words, "--json", "-q"])
    record = json.loads(result.stdout[result.stdout.index("{") :])
    assert record["scores"][0]["metrics"]["perplexity"] == pytest.approx(alone, rel=1e-3)


def test_stories_of_babilong_fill_the_length_and_answer_with_the_latest_place(tokenizer: Any) -> None:
    text = Path(HELD_OUT_NOVEL).read_text(encoding="utf-8")
    for length in (512, 2048):
        for row in draw_stories(tokenizer, text, length, count=5, seed=0):
            person = row["question"].removeprefix("Where is ").removesuffix("? ")
            told = re.findall(rf"{person} (?:{'|'.join(MOVES)}) (\w+)\.", row["input"])
            assert told and told[-1] == row["target"]
            tokens = len(tokenizer(row["input"]).input_ids)
            assert tokens < length - 256 and (length == 512 or tokens > length - 768)


def test_unknown_task_is_named(tasks: Path, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="no_such_task"):
        measure_tasks(ScriptedModel(tokenizer), tokenizer, ["no_such_task"], max_length=256, task_folder=str(tasks))


def test_missing_package_names_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    result = CliRunner().invoke(app, ["demo", "--task", "harness", "--harness", "lambada_openai"])
    assert isinstance(result.exception, CalibrationError)
    assert "pip install" in result.exception.fix and "harness" in result.exception.fix


@pytest.mark.parametrize(
    ("task", "new_tokens"),
    [
        ("qasper", 128),
        ("hotpotqa", 32),
        ("2wikimqa", 32),
        ("trec", 64),
        ("triviaqa", 32),
        ("lcc", 64),
        ("repobench-p", 64),
    ],
)
def test_harness_defines_the_tasks_of_table_2_with_longbenchs_answer_lengths(task: str, new_tokens: int) -> None:
    definition = Path(lm_eval.__file__).parent / "tasks" / "longbench" / f"{task}.yaml"
    text = definition.read_text(encoding="utf-8")
    assert f"task: longbench_{task}\n" in text
    assert f"max_gen_toks: {new_tokens}\n" in text
