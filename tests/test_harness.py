"""lm-evaluation-harness on converted models, with a task that this test defines."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from benchmarks.harness import measure_tasks
from benchmarks.long_tasks import MOVES, NEEDLES, draw_stories, measure_long_tasks, write_rows
from benchmarks.measures import TASKS, app
from converter.commands.cli import app as mmod
from converter.commands.opening import HELD_OUT_NOVEL
from converter.errors import CalibrationError, UsageError
from converter.source import resolve
from tests.converted_folder import convert
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
    assert score.metrics == {"exact_match": 1.0, "exact_match_stderr": 0.0}
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
    record = json.loads(result.stdout)
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
    record = json.loads(result.stdout)
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


def test_long_tasks_are_made_at_a_length_and_read_whole_or_on_a_window(
    tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(HELD_OUT_NOVEL).read_text(encoding="utf-8")[:60_000]
    model = ScriptedModel(tokenizer, fact=r"is: (\d{7})\.", asked="mentioned in the provided text is")
    found: dict[int | None, dict[str, float]] = {}
    for window in (None, 192):
        scores = measure_long_tasks(model, tokenizer, text, [512], limit=4, seed=0, window=window)
        assert [score["task"] for score in scores] == [*NEEDLES, "babilong_qa1"]
        assert {(score["length"], score["samples"]) for score in scores} == {(512, 4)}
        found[window] = {score["task"]: score["score"] for score in scores}
    assert found[None]["niah_single_1"] == found[None]["niah_single_2"] == 1.0
    # Hexadecimal answers, which this model does not know.
    assert found[None]["niah_single_3"] == 0.0
    assert found[192]["niah_single_1"] < 1.0
    assert capsys.readouterr().out == ""


def test_table_of_long_tasks_has_each_score_below_its_length() -> None:
    scores = [("niah_single_1", 512, 0.25), ("niah_single_1", 1024, 0.5), ("ruler_vt", 1024, 0.75)]
    entry = {
        "model": "demo",
        "scores": [{"task": t, "length": n, "samples": 4, "score": share} for t, n, share in scores],
    }
    record = {"settings": {"lengths": [512, 1024], "window": 256}, "models": [entry]}
    [(title, columns, rows)] = TASKS["long-tasks"].tables(record)
    assert columns == ("task", "512", "1k") and "last 256 tokens" in title
    assert rows == [("niah_single_1", "0.250", "0.500"), ("ruler_vt", "-", "0.750")]


def write_short_tasks(folder: Path) -> None:
    """Three documents of each short task, as files in the layout of their data sets on the Hub."""
    splits = {
        "EleutherAI/lambada_openai": ("default", "test", {"text": "She took her hat and left the old house"}),
        "Rowan/hellaswag": (
            "default",
            "validation",
            {
                "ind": 1,
                "activity_label": "Cooking",
                "ctx_a": "A man cuts an onion.",
                "ctx_b": "he",
                "ctx": "A man cuts an onion. he",
                "endings": ["fries it.", "sings.", "runs.", "sleeps."],
                "label": "0",
            },
        ),
        "allenai/ai2_arc": (
            "ARC-Easy",
            "test",
            {
                "id": "1",
                "question": "What do plants need?",
                "choices": {"text": ["light", "tin", "salt", "glue"], "label": ["A", "B", "C", "D"]},
                "answerKey": "A",
            },
        ),
        "baber/piqa": (
            "default",
            "validation",
            {"goal": "Dry a shirt.", "sol1": "Hang it.", "sol2": "Eat it.", "label": 0},
        ),
    }
    for name, (config, split, row) in splits.items():
        files = [{"split": part, "path": f"data/{part}.jsonl"} for part in {"train", "validation", split}]
        for part in files:
            write_rows(folder / name / part["path"], [row] * 3)
        (folder / name / "README.md").write_text(
            f"---\nconfigs: {json.dumps([{'config_name': config, 'data_files': files}])}\n---\n"
        )


def test_short_tasks_are_read_from_local_files_and_reach_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_short_tasks(tmp_path)
    monkeypatch.chdir(tmp_path)
    convert("demo", tmp_path / "converted")
    tasks = ["lambada_openai", "hellaswag", "arc_easy", "piqa"]
    words = [word for task in tasks for word in ("--harness", task)]
    measured = CliRunner().invoke(
        app,
        ["demo", "converted", "--task", "harness", "--lengths", "2k", *words, "--output", "scores", "--json", "-q"],
    )
    assert measured.exit_code == 0, measured.output
    record = json.loads(measured.stdout)
    for entry in record["models"]:
        assert {score["task"]: score["samples"] for score in entry["scores"]} == dict.fromkeys(tasks, 3)
    done = CliRunner().invoke(mmod, ["card", "converted", "--tasks", "scores/evaluation.json"])
    assert done.exit_code == 0, done.output
    card = (tmp_path / "converted" / "README.md").read_text(encoding="utf-8")
    for row in ("| lambada_openai, acc", "| hellaswag, acc_norm", "| arc_easy, acc_norm", "| piqa, acc_norm"):
        assert row in card
    assert f"--tasks {','.join(tasks)}" in card


def test_unknown_task_is_named(tasks: Path, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="no_such_task"):
        measure_tasks(ScriptedModel(tokenizer), tokenizer, ["no_such_task"], max_length=256, task_folder=str(tasks))


@pytest.mark.parametrize(
    ("missing", "words"),
    [("lm_eval", ("harness", "--harness", "lambada_openai")), ("wonderwords", ("long-tasks",))],
)
def test_missing_package_names_its_install_line(
    missing: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest)
    )
    result = CliRunner().invoke(app, ["demo", "--task", *words])
    assert isinstance(result.exception, CalibrationError) and missing in result.exception.message
    assert "pip install '.[harness]'" in result.exception.fix


def test_package_that_one_task_needs_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(CalibrationError, match=r"longbench_qasper.*jieba") as caught:
        measure_tasks(ScriptedModel(tokenizer), tokenizer, ["longbench_qasper"], max_length=256, limit=1)
    assert "pip install '.[harness]'" in caught.value.fix


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
