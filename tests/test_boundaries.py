"""Whatever fails outside of this tool ends in one message, never in a traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from converter.commands.console import Console
from converter.errors import (
    CorruptCheckpointError,
    LayoutError,
    ManifestError,
    MmodError,
    SourceError,
    VerificationError,
    boundary,
    redacted_message,
)
from converter.reporting import Reporter, optional_step

ROOT = Path(__file__).parent.parent
MMOD = "import sys; from converter.__main__ import main; sys.argv[0] = 'mmod'; main()"


def run(*words: str, prelude: str = "", redirect: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``mmod`` by a shell that redirects as told, after Python statements that break something."""
    command = [sys.executable, "-c", f"{prelude}\n{MMOD}", *words]
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirect}', "sh", *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_boundary_keeps_the_tools_own_errors_and_the_words_of_others() -> None:
    with (
        pytest.raises(SourceError, match="The service fails: such words") as found,
        boundary("The service fails", SourceError, "Do."),
    ):
        raise ValueError("such words")
    assert found.value.fix == "Do."
    with pytest.raises(MmodError, match="own"), boundary("The service fails", SourceError):
        raise MmodError("own")


@pytest.mark.parametrize("kind", [CorruptCheckpointError, LayoutError, ManifestError, VerificationError])
def test_fault_of_a_file_says_what_to_do_even_where_nobody_wrote_that(kind: type[MmodError]) -> None:
    assert kind("It is damaged.").fix and kind("It is damaged.", "Mend it.").fix == "Mend it."


def test_what_is_dispensable_becomes_a_warning() -> None:
    said = []

    class Kept(Reporter):
        def warn(self, text: str) -> None:
            said.append(text)

    with optional_step("There is no picture", Kept()):
        raise ZeroDivisionError("by zero")
    assert said == ["There is no picture: by zero"]


def test_words_of_an_error_hold_no_password() -> None:
    assert redacted_message(ValueError("no proxy http://me:secret@host:1/x")) == "no proxy http://host:1/x"


UNFORESEEN = (
    "import converter.source as s\ndef broken(*a, **k): raise LookupError('never seen')\ns._resolve_folder = broken"
)


WARNING = (
    "def warned(*a, **k):\n    warnings.warn('it is so\\nTraceback (most recent call last)')\n"
    "    return old(*a, **k)\ns._resolve_folder = warned"
)


@pytest.mark.parametrize("debug", ["", "option", "variable"])
def test_unforeseen_error_is_one_message_and_a_traceback_on_demand(debug: str) -> None:
    options = ["--debug"] if debug == "option" else []
    environment = {"MMOD_DEBUG": "1"} if debug == "variable" else {}
    done = run("inspect", "demo", *options, prelude=UNFORESEEN, **environment)
    assert done.returncode == 1
    assert "Error: LookupError: never seen\n" in done.stderr and "--debug" in done.stderr
    assert ("Traceback" in done.stderr) == bool(debug)


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("import huggingface_hub.constants", "HF_HUB_ETAG_TIMEOUT"),
        ("from huggingface_hub import HfApi; HfApi().model_info('a/b')", "HF_TOKEN"),
        ("from huggingface_hub import HfApi; HfApi().model_info('a/b')", "SSL_CERT_FILE"),
        ("import torch.jit", "PYTORCH_JIT"),
        (
            "from converter.errors import MmodError, boundary\n"
            "with boundary('numba does not start', MmodError): import torch.jit",
            "PYTORCH_JIT",
        ),
    ],
)
def test_variable_that_a_library_cannot_read_is_named(code: str, named: str) -> None:
    prelude = f"import converter.source as s\ndef broken(*a, **k): exec({code!r})\ns._resolve_folder = broken"
    done = run("inspect", "demo", prelude=prelude, **{named: "soön"})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"The variable {named} may be the cause: correct or unset it."


def test_unforeseen_error_of_a_library_names_it() -> None:
    prelude = UNFORESEEN.replace("raise LookupError('never seen')", "import numpy; numpy.zeros('a')")
    done = run("inspect", "demo", prelude=prelude.replace("numpy.zeros('a')", "numpy.testing.assert_(0)"))
    assert done.returncode == 1 and "numpy failed" in done.stderr and "This is a bug" in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        "MemoryError()",
        'RuntimeError("can\'t start new thread")',
        "__import__('torch').OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')",
        "RuntimeError('[enforce fail] DefaultCPUAllocator: can\\'t allocate memory: 9 bytes')",
    ],
)
def test_machine_without_memory_or_threads_is_no_bug(error: str) -> None:
    done = run("inspect", "demo", prelude=UNFORESEEN.replace("LookupError('never seen')", error))
    assert done.returncode == 1 and "There is no memory left, or no thread" in done.stderr
    assert "ulimit -v" in done.stderr and "bug" not in done.stderr


def test_address_and_missing_folder_are_named_where_the_hub_is_not_reached() -> None:
    done = run("inspect", "acme/model", HF_ENDPOINT="no address")
    assert done.returncode == 1 and "the variable HF_ENDPOINT" in done.stderr
    assert "There is no folder acme/model here." in done.stderr


@pytest.mark.parametrize("error", ["json.loads('')", "numpy.array(['']).astype(float)", "yaml.safe_load('a: [')"])
def test_variables_that_every_shell_has_are_not_suspected(error: str) -> None:
    prelude = UNFORESEEN.replace("raise LookupError('never seen')", f"import json, numpy, yaml; {error}")
    done = run("inspect", "demo", prelude=prelude, EMPTY="", _="/usr/bin/env", SHLVL="1")
    assert done.returncode == 1 and "may be the cause" not in done.stderr, done.stderr


def test_warning_of_a_library_is_one_line() -> None:
    prelude = f"import converter.source as s, warnings\nold = s._resolve_folder\n{WARNING}"
    done = run("inspect", "demo", prelude=prelude)
    assert done.returncode == 0
    assert "Warning: UserWarning: it is so\n" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [("--help",), ("no-such-command",)])
def test_terminal_without_width_is_taken_for_one_of_the_usual_width(words: tuple[str, ...]) -> None:
    done = run(*words, COLUMNS="0")
    assert "Usage: " in done.stdout + done.stderr


@pytest.mark.parametrize("package", ["typer", "rich", "numpy"])
@pytest.mark.parametrize(
    "content", [None, "from nowhere import nothing", "raise ImportError('no such symbol', name='{}._c')"]
)
def test_package_that_does_not_load_is_named_with_the_remedy(
    tmp_path: Path, package: str, content: str | None
) -> None:
    prelude, named = f"import sys; sys.modules['{package}'] = None", package
    if content is not None:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(content.format(package))
        prelude, named = "", "nowhere" if "nowhere" in content else package
    done = run("inspect", "demo", "--json", prelude=prelude, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert first.startswith(f"Error: {named} does not load: ")
    assert second == f"Install it again in {sys.prefix}: pip install --force-reinstall {named}"
    assert json.loads(done.stdout) == {"error": first.removeprefix("Error: "), "fix": second, "exit_code": 1}


def test_interrupt_while_packages_load_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)")
    done = run("inspect", "demo", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (done.returncode, done.stderr) == (130, "Interrupted; no incomplete output is left.\n")


@pytest.mark.parametrize(
    ("options", "redirect", "code", "said"),
    [
        ((), "2>&-", 0, ""),
        ((), "2>/dev/full", 0, ""),
        (("--json",), ">/dev/full", 1, "Error: What this command prints .*No space left"),
        (("--json",), ">&-", 2, "Error: The result cannot be written: stdout is closed"),
        ((), ">&-", 2, "Error: The result cannot be written: stdout is closed"),
    ],
)
def test_closed_or_full_terminal(options: tuple[str, ...], redirect: str, code: int, said: str) -> None:
    done = run("inspect", "demo", *options, redirect=redirect)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert not said or re.search(said, done.stderr), done.stderr


def test_unknown_user_without_home_is_told_that_there_is_no_such_folder() -> None:
    done = run("inspect", "~nobody-known/model")
    assert "There is no folder ~nobody-known/model" in done.stderr


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:9", "socks5://me:secret@127.0.0.1:9"])
def test_proxy_that_the_client_cannot_use_is_named(proxy: str) -> None:
    done = run("inspect", "acme/model", ALL_PROXY=proxy, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "ALL_PROXY" in done.stderr and "secret" not in done.stderr


GONE = f"import os, sys, tempfile; sys.path[0] = {str(ROOT)!r}; os.chdir(tempfile.mkdtemp()); os.rmdir(os.getcwd())"
NO_PLACE = (
    "import converter.source as source, tempfile; tempfile.tempdir = None\n"
    "tempfile._candidate_tempdir_list = list; source.resolve = lambda *_, **__: tempfile.gettempdir()"
)


@pytest.mark.parametrize(
    ("prelude", "word", "code", "said"),
    [
        (GONE, "demo", 2, "Error: The current folder is gone: .*\nChange to one"),
        ("", "mod\udcff", 2, r"Error: 'mod\\udcff' is no UTF-8.*\nRename it"),
        (NO_PLACE, "demo", 1, "Error: .*No usable temporary directory.*\nSet TMPDIR"),
    ],
    ids=["folder that is gone", "name that is no UTF-8", "no temporary folder"],
)
def test_place_or_name_that_nothing_can_use(prelude: str, word: str, code: int, said: str) -> None:
    done = run("inspect", word, prelude=prelude)
    assert done.returncode == code and re.match(said, done.stderr), done.stderr


@pytest.mark.parametrize(("number", "fix"), [("EACCES", "rights"), ("EIO", "disk"), ("EMFILE", "ulimit -n")])
def test_error_of_the_system_has_a_remedy(number: str, fix: str) -> None:
    broken = f"def broken(*a, **k): import errno, os; raise OSError(errno.{number}, 'no', '/some/file')"
    done = run("inspect", "demo", prelude=f"import converter.source as s\n{broken}\ns._resolve_folder = broken")
    assert done.returncode == 1 and "/some/file" in done.stderr and fix in done.stderr.splitlines()[1]


@pytest.mark.parametrize(
    "words",
    [
        ("--target-len", "9" * 21),
        ("--target-len", "9" * 5_000),
        ("--target-len", "3000m"),
        ("--target-len", "0"),
        ("--seed", "9" * 21),
        ("--seed=-1",),
    ],
    ids=lambda words: words[-1][:10],
)
def test_number_that_no_run_could_use_is_a_wrong_command_line(words: tuple[str, ...]) -> None:
    done = run("convert", "demo", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr


def test_folder_named_by_a_tilde_that_the_shell_left_is_at_home(tmp_path: Path) -> None:
    model = str(ROOT / "converter" / "demo" / "models" / "tiny-mamba-256")
    words = ("--method", "constant", "--factor", "2", "--output=~/out", "-q")
    done = run("convert", model, *words, HOME=str(tmp_path))
    assert done.returncode == 0, done
    assert (tmp_path / "out" / "mmod.json").is_file()


def test_terminal_that_fails_silences_the_console_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the terminal is gone")

    monkeypatch.setattr(console._console, "print", broken)
    console.line("a")
    console.table("b", ["c"], [["d"]])
    with console.task("e", 1) as task:
        task.advance()
        task.describe("f")
    assert console._console.quiet


def test_output_to_a_file_has_a_line_of_progress_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 10.0, 31.0, 45.0, 62.0])
    monkeypatch.setattr("converter.commands.console.time.monotonic", lambda: next(clock))
    with Console().task("Calibrating (steps)", 8) as task:
        for _ in range(4):
            task.advance()
    assert capsys.readouterr().err.splitlines() == [
        "Calibrating (steps) …",
        "Calibrating (steps): 2 of 8, about 93 s left",
        "Calibrating (steps): 4 of 8, about 62 s left",
    ]


CACHES = {
    "no place for it": "numba.core.caching.CacheImpl.__init__",
    "full disk": "numba.core.caching.IndexDataCacheFile.save",
    "damaged": "numba.core.caching.IndexDataCacheFile.load",
}


@pytest.mark.parametrize("broken", CACHES.values(), ids=CACHES.keys())
def test_scan_runs_without_numbas_cache(broken: str) -> None:
    place, name = broken.rsplit(".", 1)
    module, kind = place.rsplit(".", 1)
    scan(
        f"import {module} as m\n"
        "def broken(*a, **k): raise OSError(28, 'No space left on device')\n"
        f"m.{kind}.{name} = broken\n",
        ROOT,
    )


def test_scan_of_a_user_without_home_makes_no_folder(tmp_path: Path) -> None:
    scan(
        "import numba.core.caching as m, os.path\n"
        "os.path.expanduser = lambda path: path\n"
        "m.InTreeCacheLocator.from_function = classmethod(lambda *_: None)\n",
        tmp_path,
    )
    assert not list(tmp_path.iterdir())


def scan(prelude: str, folder: Path) -> None:
    """Run the scan of Mamba-1 in a process of its own, after statements that break something."""
    script = (
        f"{prelude}import torch\n"
        "from calibrator.cpu_scan import selective_scan\n"
        "u, delta, A = torch.ones(1, 2, 3), torch.ones(1, 2, 3), -torch.ones(2, 4)\n"
        "B = C = torch.ones(1, 3, 4)\n"
        "print(selective_scan(u, delta, A, B, C, torch.zeros(1, 2, 4))[0].sum().item() > 0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "True\n", done.stderr
