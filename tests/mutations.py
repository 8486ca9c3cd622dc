"""Faults that the tests have to find: python tests/mutations.py [WORD ...]

Each fault is planted alone, in a copy of the project, and the tests that should fail are run. Words
choose faults by the names of their files or tests. Ends with 1 if a fault survived.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SECONDS = 600  # for the tests of one fault; one that makes them hang counts as found


class Fault(NamedTuple):
    """Code that occurs once in a file, what to put in its place, and pytest's -k for its tests."""

    file: str
    old: str
    new: str
    tests: str
    words: str


TRAIN = "tests/test_train.py"
FAULTS = [
    # The step.
    Fault("train.py", 'loss = terms["loss"] / parts', 'loss = terms["loss"]', TRAIN, "mean_loss"),
    Fault("train.py", "self.clip)", "math.inf)", TRAIN, "mean_loss"),
    Fault("train.py", ".detach() / parts", ".detach()", TRAIN, "mean_loss"),
    Fault("train.py", "loss = loss + self.model.aux_loss()", "pass", TRAIN, "mean_loss"),
    Fault(
        "train.py",
        "if is_finite and not self.graphs:",
        "if not self.graphs:",
        TRAIN,
        "finite_is_skipped",
    ),
    # Flags that are ignored or misread.
    Fault("train.py", "args.clip_max_norm or math.inf", "math.inf", TRAIN, "learning_rates"),
    Fault("train.py", "args.warmup_steps)", "0)", TRAIN, "learning_rates"),
    Fault(
        "train.py",
        "= args.learning_rate, args.aux_",
        "= args.learning_rate, 0 * args.aux_",
        TRAIN,
        "learning_rates",
    ),
    Fault(
        "train.py",
        "[epoch * epoch_steps for epoch in args.lr_epoch]",
        "args.lr_epoch",
        TRAIN,
        "epochs_are",
    ),
    Fault(
        "train.py",
        "math.ceil(args.epochs * epoch_steps)",
        "args.epochs * math.ceil(epoch_steps)",
        TRAIN,
        "epochs_are",
    ),
    Fault(
        "train.py", "test_pictures, args.test_batch_size", "test_pictures, 1", TRAIN, "by_picture"
    ),
    Fault("training/state.py", "        if compiled:", "        if False:", TRAIN, "compiled"),
    # Validation.
    Fault("train.py", "judge(run.used_model)", "judge(run.model)", TRAIN, "by_picture"),
    Fault(
        "train.py",
        "                    rows.append(row)",
        "                rows.append(row)",
        TRAIN,
        "by_picture",
    ),
    Fault("train.py", "bool(stopped or failures or", "bool(stopped or", TRAIN, "too_little"),
    # Going on.
    Fault(
        "train.py", 'group["lr"] = rate', 'group.setdefault("lr", rate)', TRAIN, "learning_rates"
    ),
    Fault(
        "training/state.py",
        '("lr", "fused", "foreach")',
        '("fused", "foreach")',
        TRAIN,
        "learning_rates",
    ),
    Fault(
        "training/state.py",
        'checkpoint["ema"] or checkpoint["net"]',
        'checkpoint["ema"] or self.ema.module.state_dict()',
        TRAIN,
        "added_and_dropped",
    ),
    Fault("training/log.py", "if run.step > self.total_steps or", "if", TRAIN, "is_over"),
    # Other runs' files.
    Fault(
        "training/state.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_UN", TRAIN, "second_run"
    ),
    Fault(
        "train.py",
        "folder if args.save and processes",
        "folder if processes",
        TRAIN,
        "saves_nothing",
    ),
    Fault(
        "training/state.py",
        "if path.exists() and path.resolve() not in superseded:",
        "if False:",
        TRAIN,
        "another_loss or started_anew",
    ),
    Fault(
        "training/state.py",
        "            self._superseded.add(",
        "        self._superseded.add(",
        TRAIN,
        "another_loss",
    ),
]


def is_found(fault: Fault, project: Path) -> bool:
    """Plant a fault in a copy of the project, run its tests, and take it out again.

    Raises:
        ValueError: the code has changed, or the words choose no test.
    """
    path = project / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.file} has {fault.old!r} {text.count(fault.old)} times, not once")
    path.write_text(text.replace(fault.old, fault.new))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    try:
        result = subprocess.run(
            [*command, fault.tests, "-k", fault.words],
            cwd=project,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(text)
    if result.returncode > 1:
        raise ValueError(f"{fault.tests} -k {fault.words!r} does not run: {result.stdout[-300:]}")
    return result.returncode == 1


def main() -> None:
    chosen = [f for f in FAULTS if all(w in " ".join(f) for w in sys.argv[1:])]
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        ignored = shutil.ignore_patterns(".git", "__pycache__", "pic", "runs", "out", ".venv")
        shutil.copytree(ROOT, project, ignore=ignored)
        for fault in chosen:
            found = is_found(fault, project)
            survived += not found
            verdict = "killed  " if found else "SURVIVED"
            print(
                f"{verdict} {fault.file}: {fault.old.strip()}  ->  {fault.new.strip()}", flush=True
            )
    print(f"{len(chosen) - survived} of {len(chosen)} faults were killed")
    sys.exit(survived > 0)


if __name__ == "__main__":
    main()
