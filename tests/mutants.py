"""Flips single signs, comparisons and constants in the core files, and lists those that no test notices.

Run by ``make mutants``. Each flip is made in a copy of the project and meets the few tests that are about it.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import NoReturn

import pytest
import torch

ROOT = Path(__file__).parent.parent
WORKERS = min(8, os.cpu_count() or 1)
# Longer than any of the selections takes; a flip may well make a loop endless.
SECONDS = 240
FAILED = 1


@dataclass(frozen=True)
class Flip:
    """One change, made where ``old`` stands, which must be in one place of the file alone."""

    file: str
    old: str
    new: str

    @property
    def tests(self) -> str:
        """Arguments of pytest."""
        return TESTS[self.file]


TESTS = {
    "calibrator/methods/spsa.py": "tests/test_descent.py -k 'valley or walk or preset or published'",
    "calibrator/methods/gradient.py": "tests/test_descent.py -k 'gradient or valley'",
    "calibrator/methods/constant.py": "tests/test_descent.py -k constant",
    "calibrator/methods/floor.py": "tests/test_descent.py -k 'floor or form'",
    "calibrator/methods/winsorize.py": "tests/test_descent.py -k 'winsorizing or quantile or form'",
    "calibrator/validation.py": "tests/test_validation.py",
    "calibrator/skills.py": "tests/test_skills.py",
    "calibrator/kept_keys.py": "tests/test_kept_keys.py",
    "calibrator/carried_state.py": "tests/test_kept_keys.py",
    "calibrator/recurrence.py": "tests/test_kept_keys.py",
    "converter/scales.py": "tests/test_scales.py",
    "converter/baking.py": "tests/test_bake.py tests/test_gguf_bake.py tests/test_scaling.py -k 'not is_the_baked'",
    "converter/proof.py": "tests/test_verify.py tests/test_verify_hub.py",
}

SPSA, GRADIENT, CONSTANT, FLOOR, WINSORIZE, VALIDATION, SKILLS, KEYS, CARRY, RECURRENCE, SCALES, BAKE, VERIFY = (
    TESTS
)

FLIPS = (
    Flip(SPSA, "s.sub_(rate", "s.add_(rate"),
    Flip(SPSA, "log_s.grad = _slopes(", "log_s.grad = -_slopes("),
    Flip(SPSA, "signs) - loss(", "signs) + loss("),
    Flip(SPSA, "= (0.75, 1.0), 0.01", "= (0.5, 1.0), 0.01"),
    Flip(SPSA, "= (0.75, 1.0), 0.01", "= (0.75, 1.0), 0.02"),
    Flip(SPSA, "= 30, 0.001", "= 31, 0.001"),
    Flip(SPSA, "= 30, 0.001", "= 30, 0.002"),
    Flip(SPSA, "SPREAD_DECAY = 0.1", "SPREAD_DECAY = 0.3"),
    Flip(SPSA, "max(HORIZON, steps)", "HORIZON"),
    Flip(SPSA, "if candidate.objective > 0:", "if candidate.objective < 0:"),
    Flip(GRADIENT, "betas=BETAS)", "betas=BETAS, maximize=True)"),
    Flip(GRADIENT, "if not problem.validation.judge(1)", "if problem.validation.judge(1)"),
    Flip(GRADIENT, "return weight * (due", "return -weight * (due"),
    Flip(CONSTANT, "candidate.objective < best.objective", "candidate.objective > best.objective"),
    Flip(CONSTANT, "if candidate.allowed and", "if"),
    Flip(CONSTANT, "> FARTHEST", "> 4"),
    Flip(CONSTANT, "math.log(settings.factor)", "-math.log(settings.factor)"),
    Flip(CONSTANT, "0 < settings.factor <", "0 <= settings.factor <"),
    Flip(FLOOR, ".clamp(-MOST, 0)", ".clamp(-MOST)"),
    Flip(FLOOR, "need = -(tau", "need = (tau"),
    Flip(FLOOR, "need.amax(", "need.amin("),
    Flip(FLOOR, "[settings.tau] if settings.tau", "[2 * settings.tau] if settings.tau"),
    Flip(FLOOR, "share * settings.train_len for", "share * settings.target_len for"),
    Flip(WINSORIZE, "values.clip(low, high) - values", "values - values.clip(low, high)"),
    Flip(WINSORIZE, "1 - settings.quantile", "1"),
    Flip(WINSORIZE, "quantile < 0.5", "quantile <= 0.5"),
    Flip(VALIDATION, "short_change + MARGIN * short_error <=", "short_change + MARGIN * short_error >="),
    Flip(VALIDATION, "short_change + MARGIN * short_error <=", "short_change - MARGIN * short_error <="),
    Flip(VALIDATION, "errors).argmax()", "errors).argmin()"),
    Flip(VALIDATION, "return min((c for c", "return max((c for c"),
    Flip(VALIDATION, "for c in self.candidates if c.allowed)", "for c in self.candidates)"),
    Flip(VALIDATION, "return after - before", "return before - after"),
    Flip(VALIDATION, "WON * (math.isfinite(before) - math", "-WON * (math.isfinite(before) - math"),
    Flip(VALIDATION, "objective += ANSWERS", "objective -= ANSWERS"),
    Flip(VALIDATION, "inside, kept = share, candidate", "outside, kept = share, candidate"),
    Flip(VALIDATION, "if keeps(better):", "if not keeps(better):"),
    Flip(VALIDATION, "kept.objective and not keeps", "kept.objective and keeps"),
    Flip(VALIDATION, "row[start : 2 * start]", "row[: 2 * start]"),
    Flip(VALIDATION, "if best.share < 1", "if best.share > 1"),
    Flip(
        VALIDATION,
        "self._scaling.rounded(self._load_dtype):\n            batches",
        "torch.no_grad():\n            batches",
    ),
    Flip(SKILLS, ">= LEAST_SHARE", "< LEAST_SHARE"),
    Flip(SKILLS, "self.before - self.after > max", "self.after - self.before > max"),
    Flip(SKILLS, "max(self.bound, LEAST_DROP)", "min(self.bound, LEAST_DROP)"),
    Flip(SKILLS, "ERROR_RATE / len(self.cells)", "ERROR_RATE"),
    Flip(SKILLS, "math.sqrt(len(change))", "1"),
    Flip(SKILLS, "near = min(", "near = max("),
    Flip(KEYS, "if (method, number) in self._added:", "if False:"),
    Flip(KEYS, "tensor.detach()", "tensor"),
    Flip(KEYS, "tensor.shape[axis] - self._most, self._most", "0, self._most"),
    Flip(KEYS, "= self._start + tokens", "= tokens"),
    Flip(CARRY, "self.layer, self._scanned = layer, 0", "self.layer = layer"),
    Flip(CARRY, "state = state + trace", "state = state - trace"),
    Flip(RECURRENCE, "(decay, trace))[:2]", "(-decay, trace))[:2]"),
    Flip(RECURRENCE, "max(1, attention_window // 2)", "attention_window"),
    Flip(RECURRENCE, 'if name not in ("cache"', 'if name in ("cache"'),
    Flip(SCALES, 'if form == "linear"', 'if form != "linear"'),
    Flip(SCALES, "A_log + log_s", "A_log - log_s"),
    Flip(SCALES, "A_log * exp(log_s)", "A_log / exp(log_s)"),
    Flip(BAKE, "** np.exp(log_s))", "** np.exp(-log_s))"),
    Flip(BAKE, "return after - before", "return before - after"),
    Flip(BAKE, "np.abs(after[moved] / before[moved])", "np.abs(before[moved] / after[moved])"),
    Flip(BAKE, "if change.log_s.any() or change", "if change.log_s.any() and change"),
    Flip(BAKE, 'dtype = "F32" if', 'dtype = "F32" if not'),
    Flip(BAKE, "if not np.isfinite(after).all()", "if not np.isfinite(after).any()"),
    Flip(BAKE, "> _LARGEST_LOG", "> 1e300"),
    Flip(BAKE, "longest < target_len", "longest > target_len"),
    Flip(BAKE, "growth - dropped", "growth + dropped"),
    Flip(VERIFY, "if data == from_float64", "if data != from_float64"),
    Flip(VERIFY, "(low <= values) & (values <= high)", "(low <= values) | (values <= high)"),
    Flip(VERIFY, "_EXP_TOLERANCE = 1e-13", "_EXP_TOLERANCE = 1e-4"),
    Flip(VERIFY, "elif not tensor.equals(", "elif tensor.equals("),
    Flip(VERIFY, "or file.name in by_hash", "or file.name not in by_hash"),
    Flip(VERIFY, "if tensor.name in changes:", "if tensor.name not in changes:"),
    Flip(VERIFY, "if said != due", "if said == due"),
    Flip(VERIFY, 'content.get("seal") != seal_of', 'content.get("seal") == seal_of'),
    Flip(VERIFY, "for path in sorted(due.keys() - present)", "for path in sorted(present - due.keys())"),
    Flip(VERIFY, "if converted.read(path) != due[path]", "if converted.read(path) == due[path]"),
    Flip(VERIFY, "!= manifest.files.get(SCALES_NAME)", "== manifest.files.get(SCALES_NAME)"),
    Flip(VERIFY, "if found.config != config", "if found.config == config"),
    Flip(VERIFY, "(seen.dtype, seen.shape) != (due.dtype, due.shape)", "seen.dtype != due.dtype"),
    Flip(VERIFY, "(seen.dtype, seen.shape) != (due.dtype, due.shape)", "seen.shape != due.shape"),
    Flip(VERIFY, "revision != manifest", "revision == manifest"),
    Flip(VERIFY, "getattr(manifest, field) != getattr", "getattr(manifest, field) == getattr"),
    Flip(VERIFY, "- len(changes) - unread", "- len(changes)"),
    Flip(VERIFY, "return digest.hexdigest() == self.sha256", "return True"),
    Flip(VERIFY, "if digest and isinstance(told.shard, SafetensorsShard) and not its", "if digest and its"),
)


def copy_project(folder: Path) -> Path:
    """The files that git knows or would add, as they are now."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run(copy: Path, tests: str) -> int:
    """Pytest's exit status in a copy; that of a failed test where it takes too long."""
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(copy, tests))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        return FAILED
    assert process.exitcode is not None
    return process.exitcode


def _pytest(copy: Path, tests: str) -> NoReturn:
    """Run in a process of its own, which has the large libraries and nothing of the project."""
    os.chdir(copy)
    sys.path[0] = str(copy)
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    os.environ.update(OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(copy / ".cache"))
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *shlex.split(tests)]))


def survives(flip: Flip, copies: SimpleQueue[Path]) -> str:
    """Why a flip counts as unnoticed, or nothing."""
    copy = copies.get()
    original = (copy / flip.file).read_text()
    try:
        if original.count(flip.old) != 1:
            return "stands in the file not once"
        (copy / flip.file).write_text(original.replace(flip.old, flip.new))
        status = run(copy, flip.tests)
        return "" if status == FAILED else f"survives (exit status of pytest: {status})"
    finally:
        (copy / flip.file).write_text(original)
        copies.put(copy)


def main() -> int:
    """Run all flips, or those of the files named on the command line."""
    flips = [flip for flip in FLIPS if not sys.argv[1:] or flip.file in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(WORKERS) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(WORKERS):
            copies.put(copy_project(Path(place) / str(number)))

        def passes(tests: str) -> bool:
            copy = copies.get()
            try:
                return run(copy, tests) == 0
            finally:
                copies.put(copy)

        selections = list(dict.fromkeys(flip.tests for flip in flips))
        for tests, passed in zip(selections, pool.map(passes, selections), strict=True):
            if not passed:
                print(f"These tests fail without any flip: {tests}")
                return 1
        unnoticed = 0
        for flip, why in zip(flips, pool.map(lambda flip: survives(flip, copies), flips), strict=True):
            if why:
                unnoticed += 1
                print(f"{flip.file}: {flip.old!r} -> {flip.new!r} {why}", flush=True)
    print(f"{len(flips)} flips, {unnoticed} unnoticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
