"""From texts to windows: what is read, where documents end, what is held out, and where windows come from."""

from __future__ import annotations

import copy
import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from calibrator.text import PIECE, Text, TextSource, WindowSampler, hold_out, read_text, require_texts, take_span
from converter.errors import TextError, UsageError, redacted_message
from converter.reporting import Reporter
from tests.dataset_server import served
from tests.stock_models import RememberingReporter

DEMO = Path(__file__).parent.parent / "converter" / "demo" / "models" / "tiny-mamba2-256"
MANY = 1 << 20


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO)


def numbered(*lengths: int, name: str = "text", weight: float = 1.0) -> Text:
    """Documents whose tokens say where they are: 1000 times the document's number plus the position."""
    documents = tuple(1000 * number + torch.arange(length) for number, length in enumerate(lengths, 1))
    return Text(name, documents, weight)


# Reading


def test_weights_are_parsed_where_there_are_any(tmp_path: Path) -> None:
    assert TextSource.parse("book.txt") == TextSource("book.txt")
    assert TextSource.parse("book.txt=2.5") == TextSource("book.txt", 2.5)
    assert TextSource.parse("folder/a=b.txt") == TextSource("folder/a=b.txt")
    (tmp_path / "run=2").write_text("words")
    assert TextSource.parse(f"{tmp_path}/run=2") == TextSource(f"{tmp_path}/run=2")
    assert TextSource.parse(f"{tmp_path}/run=2=3") == TextSource(f"{tmp_path}/run=2", 3)
    for bad in ("book.txt=0", "book.txt=-1", "book.txt=inf", "book.txt=nan"):
        with pytest.raises(UsageError, match="weight"):
            TextSource.parse(bad)


def test_a_file_is_a_document_and_a_line_of_jsonl_is_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "b.txt").write_text("Second file.")
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n\n{"content": "Two.", "id": 3}\n')
    (tmp_path / "c.md").write_text("# Third")
    (tmp_path / "ignored.bin").write_bytes(b"\xff\x00")
    text = read_text(TextSource(str(tmp_path)), tokenizer, limit=MANY)
    assert text.name == tmp_path.name
    assert [tokenizer.decode(document) for document in text.documents] == [
        "One.",
        "Two.",
        "Second file.",
        "# Third",
    ]
    assert text.record("calibration").documents == 4


ROWS = [{"id": 1, "text": "One."}, {"id": 2, "text": "Two."}]
LINES = "\n".join(map(json.dumps, ROWS))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.ndjson", LINES),
        ("rows.JSONL", LINES),
        ("rows.json", LINES),
        ("rows.txt", LINES),
        ("rows", LINES),
        ("rows.json", json.dumps(ROWS, indent=1)),
        ("rows.txt", json.dumps(["One.", "Two."])),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_rows_are_read_as_rows_whatever_their_file_is_called(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, content: str, encoding: str
) -> None:
    (tmp_path / name).write_text(content, encoding=encoding)
    text = read_text(TextSource(str(tmp_path / name)), tokenizer, limit=MANY)
    assert [tokenizer.decode(document) for document in text.documents] == ["One.", "Two."]


@pytest.mark.parametrize("content", ["One. {", "{One}", "[One] two", "\ufeffOne."])
def test_text_that_looks_like_json_is_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: str
) -> None:
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    text = read_text(TextSource(str(tmp_path / "a.txt")), tokenizer, limit=MANY)
    assert tokenizer.decode(text.documents[0]) == content.removeprefix("\ufeff")


def test_links_and_pipes_of_a_folder_are_named_as_not_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = tmp_path / "texts"
    (folder / ".git").mkdir(parents=True)
    for name in ("a.txt", ".hidden.txt", ".git/b.txt"):
        (folder / name).write_text("Words.")
    os.mkfifo(folder / "p.txt")
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "loop").symlink_to(".")
    reporter = RememberingReporter()
    text = read_text(TextSource(str(folder)), tokenizer, limit=MANY, reporter=reporter)
    assert len(text.documents) == 1 and "gone.txt, loop, p.txt are not read" in reporter.warnings[0]


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("a.txt", "B.TXT", "c.pdf", ".hidden"):
        (tmp_path / name).write_text("Text.")
    (tmp_path / "d.txt").touch()
    reporter = KeptWarnings()
    assert len(read_text(TextSource(str(tmp_path)), tokenizer, limit=MANY, reporter=reporter).documents) == 2
    assert len(reporter.warnings) == 1 and "c.pdf, d.txt are not read" in reporter.warnings[0]


class KeptWarnings(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_token_beyond_the_embedding_is_named_with_its_place(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n{"text": "ab<end>"}\n')
    enlarged = copy.deepcopy(tokenizer)
    rows = len(enlarged)
    enlarged.add_tokens(["<end>"])
    source = TextSource(str(tmp_path / "a.jsonl"))
    read_text(source, enlarged, limit=MANY, rows=rows + 1)
    with pytest.raises(TextError, match=rf"document 2: token \d+ is '<end>' with the id {rows}.*has {rows} rows"):
        read_text(source, enlarged, limit=MANY, rows=rows)


@pytest.mark.parametrize("known", [0, 9, 10, 20])
def test_text_that_the_tokenizer_does_not_know_is_told(tmp_path: Path, known: int) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "river": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    (tmp_path / "a.txt").write_text("river " * known + "bridge " * (20 - known))
    if known < 10:
        with pytest.raises(TextError, match=f"too little of a.txt: {100 - 5 * known}% of the tokens are '<unk>'"):
            read_text(TextSource(str(tmp_path / "a.txt")), tokenizer, limit=MANY)
    else:
        assert read_text(TextSource(str(tmp_path / "a.txt")), tokenizer, limit=MANY).tokens == 20


def test_joined_documents_are_one_with_the_end_of_text_between_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n{"text": "Two."}\n')
    apart = read_text(TextSource(str(tmp_path)), tokenizer, limit=MANY)
    joined = read_text(TextSource(str(tmp_path)), tokenizer, limit=MANY, join=True)
    separator = torch.tensor([tokenizer.eos_token_id])
    assert torch.equal(joined.documents[0], torch.cat([apart.documents[0], separator, apart.documents[1]]))
    assert joined.record("calibration").sha256 != apart.record("calibration").sha256


def test_documents_start_as_the_tokenizer_starts_them(tmp_path: Path) -> None:
    class WithStart:
        """A tokenizer that puts token 1 before every text, as Llama's does."""

        eos_token_id = 2

        def __call__(self, content: str) -> WithStart:
            self.input_ids = [1, *content.encode()]
            return self

    (tmp_path / "a.jsonl").write_text('{"text": "A"}\n{"text": "B"}\n')
    apart = read_text(TextSource(str(tmp_path)), WithStart(), limit=MANY)
    assert [document.tolist() for document in apart.documents] == [[1, 65], [1, 66]]
    joined = read_text(TextSource(str(tmp_path)), WithStart(), limit=MANY, join=True)
    assert joined.documents[0].tolist() == [1, 65, 1, 66]


def test_reading_stops_at_the_limit(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [json.dumps({"text": f"Sentence number {n} of a long list."}) for n in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\nno JSON at all")
    text = read_text(TextSource(str(tmp_path / "a.jsonl")), tokenizer, limit=100)
    assert text.tokens == 100
    with pytest.raises(TextError, match=r"a\.jsonl"):
        read_text(TextSource(str(tmp_path / "a.jsonl")), tokenizer, limit=MANY)


def test_no_more_of_a_document_is_tokenised_than_is_wanted(tmp_path: Path) -> None:
    class Counting:
        longest, eos_token_id = 0, None

        def __call__(self, text: str) -> SimpleNamespace:
            self.longest = max(self.longest, len(text))
            return SimpleNamespace(input_ids=[len(word) for word in text.split()])

    (tmp_path / "text.txt").write_text("word " * 100_000)
    counting = Counting()
    assert read_text(TextSource(str(tmp_path / "text.txt")), counting, limit=100).tokens == 100
    assert counting.longest < 10_000


def test_text_without_the_right_to_read_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "text.txt").write_text("words")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(TextError, match="cannot be read: Permission denied") as refused:
        require_texts([TextSource(str(tmp_path / "text.txt"))])
    assert refused.value.fix == "See to its rights."


def test_fingerprint_is_of_the_tokens_read(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "a.txt").write_text("The same words.")
    (tmp_path / "b.txt").write_text("The same words.")
    (tmp_path / "c.txt").write_text("Other words.")
    records = {
        name: read_text(TextSource(str(tmp_path / f"{name}.txt")), tokenizer, limit=MANY).record("held-out")
        for name in "abc"
    }
    assert records["a"].sha256 == records["b"].sha256 != records["c"].sha256
    assert (records["a"].name, records["a"].role) == ("a.txt", "held-out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "no text"),
        ("latin.txt", "é".encode("latin-1"), "cannot be read"),
        ("rows.jsonl", b'{"words": "x"}\n', "no text field"),
        ("rows.jsonl", b"{", "rows.jsonl is no JSON"),
        ("rows.jsonl", b'{"text": "x"}\n{"text": "y"', "rows.jsonl, line 2 is no JSON"),
        ("rows.json", b'[{"text": "x"}, {"id": 1}]', "row 2 has no text field"),
        ("rows.jsonl", b'{"text": "x"}\n{"text": "a\\ud83d"}', "line 2 holds half a character, .*as character 2"),
        ("table.csv", b"text\nx\n", "is a table"),
        ("book.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:7\nsize 9\n", "git-lfs pointer"),
        (
            "bom.txt",
            b"\xef\xbb\xbfversion https://git-lfs.github.com/spec/v1\r\noid sha256:7\r\n",
            "git-lfs pointer",
        ),
        ("rows.jsonl.gz", gzip.compress(b'{"text": "x"}', mtime=0), "rows.jsonl.gz cannot be read"),
        ("wide.txt", "words".encode("utf-32"), "holds zero bytes"),
        ("wide.txt", "words".encode("utf-16-le"), "holds zero bytes"),
        ("", b"", "There is no text"),
        ("folder/", b"", "holds no"),
    ],
)
def test_unreadable_texts_say_why(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / (name or "missing.txt")
    if name.endswith("/"):
        path.mkdir()
    elif name:
        path.write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_text(TextSource(str(path)), tokenizer, limit=MANY)


def test_first_document_is_read_before_anything_slow(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("text\nx\n")
    with pytest.raises(TextError, match="is a table"):
        require_texts([TextSource(str(tmp_path / "table.csv"))])


@pytest.mark.parametrize("content", ["", " \n\t\n", "\ufeff"])
def test_text_without_a_word_is_refused_before_anything_slow(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(TextError, match="holds no text"):
        require_texts([TextSource(str(tmp_path / "a.txt"))])


@pytest.mark.parametrize("content", ["Words from a pipe.", '{"text": "One."}\n{"text": "Two."}\n'])
def test_what_comes_through_a_pipe_is_read_once_and_used_twice(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: str
) -> None:
    (tmp_path / "file").write_text(content)
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["sh", "-c", "cat file > pipe"], cwd=tmp_path):
        require_texts([TextSource(str(tmp_path / "pipe"))])
    pipe, file = (read_text(TextSource(str(tmp_path / name)), tokenizer, limit=MANY) for name in ("pipe", "file"))
    assert list(map(torch.Tensor.tolist, pipe.documents)) == list(map(torch.Tensor.tolist, file.documents))


def test_a_hub_data_set_is_streamed_and_not_downloaded_whole(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"Document {n}. " + "words and more words " * 200}) for n in range(400)]
    shard = "\n".join(rows).encode()
    card = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/*.jsonl\n---\n"
    files = {"README.md": card, "data/a.jsonl": shard, "data/b.jsonl": shard}
    code = (
        "import json, sys\n"
        "from transformers import AutoTokenizer\n"
        "from calibrator.text import TextSource, read_text\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "text = read_text(TextSource('alice/books:train'), tokenizer, limit=3000)\n"
        "print(json.dumps([text.name, text.tokens, tokenizer.decode(text.documents[1])[:11]]))\n"
    )
    with served("alice/books", files) as server:
        # What has begun is tried again.
        server.failures["data/a.jsonl"] = 2
        environment = os.environ | {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path)}
        result = subprocess.run(
            [sys.executable, "-c", code, str(DEMO)], env=environment, capture_output=True, text=True, check=False
        )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == ["alice/books:train", 3000, "Document 1."]
    assert server.sent["data/a.jsonl"] > 0 == server.sent["data/b.jsonl"]
    assert server.failures["data/a.jsonl"] == 0


def test_a_data_set_out_of_reach_is_an_error(tmp_path: Path) -> None:
    code = (
        "from calibrator.text import TextSource, read_text\n"
        "from converter.errors import TextError\n"
        "try:\n    read_text(TextSource('alice/books'), None, limit=1)\n"
        "except TextError as error:\n    print(error.message)\n"
    )
    with served("bob/letters", {}) as server:
        environment = os.environ | {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path)}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
    assert result.stdout.startswith("The data set alice/books cannot be read")


def test_a_line_that_breaks_in_the_middle_is_an_error(tmp_path: Path) -> None:
    code = (
        "from calibrator.text import TextSource, read_text\n"
        "from converter.errors import TextError\n"
        "try:\n    read_text(TextSource('alice/books'), None, limit=1)\n"
        "except TextError as error:\n    print(error.message)\n"
    )
    with served("alice/books", {"data.jsonl": b'{"text": "words"}\n'}) as server:
        server.answers = 2
        environment = os.environ | {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path)}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("The data set alice/books cannot be read: Server disconnected")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(), "OSError()"),
        (ValueError("\n"), r"ValueError('\n')"),
        (ValueError("no\n  file at https://hub/a?X-Sig=1 for hf_abc"), "no file at https://hub/a for hf_..."),
    ],
)
def test_words_of_an_error_are_one_line_without_secrets(error: Exception, said: str) -> None:
    assert redacted_message(error) == said


def test_a_hub_out_of_reach_is_given_up_within_seconds(tmp_path: Path) -> None:
    code = (
        "import time\n"
        "import datasets\n"
        "from calibrator.text import TextSource, read_text\n"
        "from converter.errors import TextError\n"
        "started = time.monotonic()\n"
        "try:\n    read_text(TextSource('alice/books'), None, limit=1)\n"
        "except TextError as error:\n    print(time.monotonic() - started, error.message)\n"
    )
    with served("alice/books", {}) as server:
        endpoint = server.endpoint
    # Nobody listens there any more.
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=100
    )
    seconds, _, said = result.stdout.partition(" ")
    assert float(seconds) < 5
    assert said.startswith("The Hub cannot be reached for alice/books")


def test_a_text_is_known_again_in_pieces_wherever_they_stand() -> None:
    """Joined, not the longest document, begun elsewhere, or read in part."""
    [long, short, other] = (torch.randperm(50_000, generator=torch.Generator().manual_seed(n)) for n in range(3))
    long, short = long[:9000], short[: 10 * PIECE]
    held_out = Text("held out", (long, short))
    assert Text("joined", (torch.cat([other, torch.tensor([7]), long]),)).share_of(held_out) > 0.9
    assert Text("short", (other, short)).share_of(held_out) == pytest.approx(10 / 150, abs=0.01)
    assert Text("part", (long[1000:3000],)).share_of(held_out) == pytest.approx(0.2, abs=0.02)
    assert Text("same", (long, short)).share_of(held_out) == 1
    assert Text("other", (other, short[: PIECE - 1])).share_of(held_out) == 0
    assert Text("other", (other,)).share_of(Text("tiny", (short[:9],))) == 0


# Windows


def test_spans_lie_within_documents() -> None:
    span = take_span(numbered(25, 9, 40), 10, 5)
    assert span[:, 0].tolist() == [1000, 1010, 3000, 3010, 3020]
    with pytest.raises(TextError, match=r"room for 6 windows of 10 tokens; 7 are needed \(it has 74 tokens"):
        take_span(numbered(25, 9, 40), 10, 7)


@given(
    st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(2, 300),
    st.integers(2, 100),
)
def test_held_out_tokens_are_never_drawn(lengths: list[list[int]], tokens: int, length: int) -> None:
    texts = [numbered(*sizes, name=f"text {n}", weight=n + 1.0) for n, sizes in enumerate(lengths)]
    try:
        kept, held_out = hold_out(texts, tokens, length)
    except TextError as error:
        assume("needed" not in error.message)
        raise
    assert sum(map(len, held_out)) <= tokens + len(texts)
    for before, after in zip(texts, kept, strict=True):
        assert 4 * (before.tokens - after.tokens) <= before.tokens
        assert 4 * max(map(len, after.documents)) >= 3 * max(map(len, before.documents))
    total = sum(text.tokens for text in texts)
    assert sum(text.tokens for text in kept) + sum(map(len, held_out)) == total
    sampler = WindowSampler(kept[:1], 0)
    if len(sampler.longest) >= length and len(texts) == 1:
        seen = set(sampler.draw(length, 20).flatten().tolist())
        assert not seen & {token for part in held_out for token in part.tolist()}


def test_too_short_a_text_says_how_many_tokens_it_has() -> None:
    with pytest.raises(TextError, match=r"found 130 tokens in 2 documents.*98 tokens; 101 are needed"):
        hold_out([numbered(100, 30)], 400, 101)


def test_every_text_gives_to_validation_by_its_weight() -> None:
    texts = [numbered(4000, name="a", weight=3.0), numbered(4000, 2000, 500, name="b", weight=1.0)]
    _, held_out = hold_out(texts, 1000, 100)
    assert list(map(len, held_out)) == [750, 250]
    assert held_out[1][-1] == 2000 + 2000 - 1


@given(st.integers(0, 5), st.integers(1, 60), st.integers(1, 8))
def test_windows_never_join_documents(seed: int, length: int, count: int) -> None:
    windows = WindowSampler([numbered(60, 80), numbered(90)], seed).draw(length, count)
    assert windows.shape == (count, length)
    assert (windows.diff(dim=1) == 1).all()


def test_windows_come_as_often_as_the_weights_say() -> None:
    heavy = Text("heavy", (torch.full((500,), 1),), weight=3.0)
    light = Text("light", (torch.full((5000,), 2), torch.full((500,), 2), torch.full((9,), 2)), weight=1.0)
    for length in (10, 480):
        # Most documents of the third text are hardly longer than a window.
        narrow = Text("narrow", tuple(torch.full((length + 1,), 3) for _ in range(20)), weight=1.0)
        windows = WindowSampler([heavy, light, narrow], 0).draw(length, 4000)
        shares = windows[:, 0].bincount(minlength=4)[1:] / len(windows)
        assert shares.tolist() == pytest.approx([0.6, 0.2, 0.2], abs=0.03)


def test_the_same_seed_draws_the_same_windows() -> None:
    text = numbered(900, 800)
    first, again, other = (WindowSampler([text], seed).draw(50, 20) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
