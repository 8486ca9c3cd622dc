"""Training as a user runs it: what it writes, what it survives, what it refuses."""

import errno
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHALLOW
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models
import train
import utils
from layers import DropPath
from models import checkpoint as checkpoint_file
from tools import export
from train import main
from training import data as training_data
from training import state
from training.criterion import RateDistortionLoss
from training.distributed import GlobalDraws, Processes
from training.optim import make_optimizers
from utils import DataError, UsageError

ROOT = Path(__file__).parent.parent
NUM_TRAIN = 5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small gain nothing from threads, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset of smooth pictures, in two formats, some smaller than the patch."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    sizes = [(64, 64), (70, 90), (64, 80), (20, 30), (1, 1)]
    for part, number in (("train", NUM_TRAIN), ("test", 2)):
        (root / part).mkdir()
        for i, (height, width) in enumerate(sizes[:number]):
            coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
            picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
            picture.save(root / part / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Weights of a network that trains in tenths of a second per step."""
    torch.manual_seed(0)
    model = models.build_model("mambavc", **SHALLOW)
    path = tmp_path_factory.mktemp("tiny") / "tiny.pth.tar"
    torch.save(
        {
            "model": "mambavc",
            "model_args": model.config,
            "state_dict": model.state_dict(),
        },
        path,
    )
    return path


@pytest.fixture
def flags(data, tiny, tmp_path):
    """Build a command line; its run goes to tmp_path/NAME/0.05, or NAME/variable."""

    def build(name, *more, steps=4):
        command = ["-d", data, "--checkpoint", tiny, "--save_path", tmp_path / name, "-n", 0]
        command += ["--batch-size", 2, "--max-steps", steps, "--log-every", 1, *more]
        if "--patch-schedule" not in more:
            command += ["--patch-size", 64, 64] if "--patch-size" not in more else []
        return [str(part) for part in command]

    return build


def load(run, name="latest"):
    folder = run / ("variable" if (run / "variable").exists() else "0.05")
    return torch.load(folder / f"checkpoint_{name}.pth.tar", map_location="cpu", weights_only=True)


def assert_same_run(a, b):
    """Two checkpoints hold the same training state bit for bit."""
    torch.testing.assert_close(a["net"], b["net"], rtol=0, atol=0)
    torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizers"], b["optimizers"], rtol=0, atol=0)
    torch.testing.assert_close(a["aux_optimizer"], b["aux_optimizer"], rtol=0, atol=0)
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])
    assert (a["step"], a["history"], a["best_loss"]) == (b["step"], b["history"], b["best_loss"])


def run_script(script, *argv, **env):
    return subprocess.run(
        [*script, *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **env},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_run_lowers_the_loss_and_writes_its_folder(flags, tmp_path):
    main(flags("run", "--optimizer", "muon", "--val-every", "4", "-n", "1", steps=12))
    folder = tmp_path / "run" / "0.05"
    log = (folder / "train.log").read_text()
    assert "step 12/12" in log
    assert "images/s" in log

    latest = load(tmp_path / "run")
    losses = [entry["loss"] for entry in latest["history"]]
    assert [entry["step"] for entry in latest["history"]] == [4, 8, 12]
    assert losses[2] < losses[1] < losses[0]
    assert latest["step"] == 12
    assert latest["epoch"] == 12 * 2 / NUM_TRAIN
    assert latest["best_loss"] == min(losses)
    assert latest["versions"]["torch"] == torch.__version__
    assert load(tmp_path / "run", "best")["best_loss"] == min(losses)

    x = torch.rand(1, 3, 30, 50)
    model = checkpoint_file.load_model(folder / "checkpoint_best.pth.tar")
    coded = model.compress(x)
    assert model.decompress(**coded)["x_hat"].shape == x.shape

    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    wanted = {"loss", "bpp", "psnr", "lr", "step_seconds", "images_per_second", "data_wait"}
    assert {f"train/{key}" for key in wanted} <= set(tags["scalars"])
    assert {"validation/loss", "validation/bpp", "validation/psnr"} <= set(tags["scalars"])
    assert {"original/0", "reconstruction/1", "rate-distortion"} <= set(tags["images"])
    assert [e.step for e in events.Scalars("validation/loss")] == [4, 8, 12]
    assert [e.step for e in events.Images("reconstruction/0")] == [4, 8, 12]
    assert [e.step for e in events.Images("original/0")] == [0]


KILLED_WHILE_WRITING = """
import os, signal, sys
import torch
sys.path.insert(0, ".")
import train, utils

save, saves = torch.save, []
def save_and_die(state, file):
    saves.append(state)
    if state["step"] == 4:
        file.write(b"half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)
torch.save = save_and_die
utils.run_main(train.main)
"""


RECIPES = {
    "cosine": ["--accumulate", "2", "--schedule", "cosine", "--warmup-steps", "2", "-n", "1"],
    # The rate falls from step 2 on; crops grow before and after the kill.
    "variable": [
        *("--qualities", "3", "--rotate", "--cache", "--patch-schedule", "32:2,64:4,128"),
        *("--schedule", "wsd", "--cooldown-steps", "4"),
    ],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_run_ends_as_one_that_never_was(flags, tmp_path, recipe):
    """SIGKILL in the middle of the second checkpoint, in the middle of an epoch."""
    options = ["--save-every", "2", "--val-every", "3", "--ema", "0.5"]
    options += ["--optimizer", "muon", *RECIPES[recipe]]
    folder = tmp_path / "killed" / ("variable" if recipe == "variable" else "0.05")
    main(flags("whole", *options, steps=6))

    killed = run_script(
        [sys.executable, "-c", KILLED_WHILE_WRITING],
        *flags("killed", *options, "--continue_train", steps=6),
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(folder.glob(".checkpoint*")), "it was not killed while it wrote"
    assert load(tmp_path / "killed")["step"] == 3  # saved for its validation loss

    main(flags("killed", *options, "--continue_train", steps=6))
    assert not list(folder.glob(".checkpoint*"))
    assert "going on at step 3" in (folder / "train.log").read_text()
    assert_same_run(load(tmp_path / "killed"), load(tmp_path / "whole"))
    ema, whole_ema = load(tmp_path / "killed")["ema"], load(tmp_path / "whole")["ema"]
    torch.testing.assert_close(ema, whole_ema, rtol=0, atol=0)
    if recipe == "variable":  # it was killed in its cool-down, and still can go back
        assert_same_run(load(tmp_path / "killed", "stable"), load(tmp_path / "whole", "stable"))


def test_longer_run_goes_on_from_before_its_cooldown(flags, tmp_path):
    """As if there had been none; what it led to is kept."""
    options = ["--schedule", "wsd", "--cooldown-steps", "2", "--learning-rate", "1e-3"]
    main(flags("whole", *options, steps=6))
    main(flags("pieces", *options, steps=4))
    folder = tmp_path / "pieces" / "0.05"
    cooled = load(tmp_path / "pieces")
    assert (cooled["step"], cooled["cooldown_from"]) == (4, 2)
    assert load(tmp_path / "pieces", "stable")["step"] == 2
    # The same command goes on in its cool-down, or has nothing to do.
    main(flags("pieces", *options, "--continue_train", steps=4))
    assert_same_run(load(tmp_path / "pieces"), cooled)

    main(flags("pieces", *options, "--continue_train", steps=6))
    assert (
        "going back to before the cool-down that began at step 2"
        in (folder / "train.log").read_text()
    )
    assert_same_run(load(tmp_path / "pieces"), load(tmp_path / "whole"))
    assert load(tmp_path / "pieces", "stable")["step"] == 4
    (kept,) = folder.glob("*-checkpoint_latest.pth.tar")
    assert_same_run(torch.load(kept, weights_only=True), cooled)
    (kept,) = folder.glob("*-checkpoint_best.pth.tar")
    assert torch.load(kept, weights_only=True)["best_loss"] == cooled["best_loss"]


def test_run_killed_after_it_went_back_goes_on_from_there(flags, tmp_path):
    options = ["--schedule", "wsd", "--cooldown-steps", "1", "--continue_train"]
    main(flags("run", *options, steps=2))
    folder = tmp_path / "run" / "0.05"
    (folder / "checkpoint_latest.pth.tar").rename(folder / "kept")
    main(flags("run", *options, steps=3))
    assert "going on at step 1" in (folder / "train.log").read_text()
    assert load(tmp_path / "run")["step"] == 3


def test_cooldown_may_come_at_any_point_of_a_run(flags, tmp_path):
    """Also one that should have begun before the step where the run stands."""
    options = ["--schedule", "wsd", "--learning-rate", "1e-3", "--cooldown-shape", "linear"]
    main(flags("run", *options, "--cooldown-steps", "0", steps=2))
    assert not list((tmp_path / "run" / "0.05").glob("checkpoint_stable*"))
    main(flags("run", *options, "--cooldown-steps", "3", "--continue_train", steps=4))
    assert load(tmp_path / "run", "stable")["step"] == 2
    events = EventAccumulator(str(tmp_path / "run" / "0.05")).Reload()
    rates = [event.value for event in events.Scalars("train/lr")]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 0.5e-3])


@pytest.mark.parametrize(
    ("weight_bytes", "dtype", "largest_change"),
    # Two steps of at most 2e-3, from weights of about 1 that were moved by 1/2,048, or 1/254.
    [(2, torch.float16, 5e-3), (1, torch.int8, 9e-3)],
)
def test_run_goes_on_elsewhere_from_weights_and_step(
    flags, tmp_path, weight_bytes, dtype, largest_change
):
    """In another folder, with optimisers that start anew, and crops that follow."""
    options = ["--optimizer", "muon", "--warmup-steps", "1"]
    main(flags("here", *options, "--ema", "0.9", steps=2))
    latest = tmp_path / "here" / "0.05" / "checkpoint_latest.pth.tar"
    piece = tmp_path / "piece.safetensors"
    export.main([str(latest), str(piece), "--for-training", "--weight-bytes", str(weight_bytes)])
    assert load_file(piece)["g_a.0.weight"].dtype == dtype
    main(flags("there", *options, "--checkpoint", str(piece), "--continue_train", steps=4))
    folder = tmp_path / "there" / "0.05"
    log = (folder / "train.log").read_text()
    assert "holds weights only: going on at step 2, with optimisers that start anew" in log
    assert "step 3/4" in log
    there, here = load(tmp_path / "there"), load(tmp_path / "here")
    assert (there["step"], there["fresh_from"]) == (4, 2)
    moved = (there["net"]["g_a.0.weight"] - here["net"]["g_a.0.weight"]).abs().max()
    assert 0 < moved < largest_change
    rates = [e.value for e in EventAccumulator(str(folder)).Reload().Scalars("train/lr")]
    assert rates == pytest.approx([1e-3, 2e-3])  # warms up once more
    # Noise goes on, too, and a checkpoint of these steps warms up as they did.
    assert not torch.equal(there["rng"]["cpu"], here["rng"]["cpu"])
    main(flags("there", *options, "--continue_train", "--warmup-steps", "3", steps=5))
    assert "lr 1.50e-03" in (folder / "train.log").read_text()
    # From what is exported for use, a training starts at step 0.
    export.main([str(latest), str(piece)])
    main(flags("use", "--checkpoint", str(piece), "--continue_train", "--no-save", steps=1))
    assert "starting at step 0" in (tmp_path / "use" / "0.05" / "train.log").read_text()


def test_piece_of_a_cooldown_goes_on_in_it(flags, tmp_path):
    """Its learning rate falls from where the first piece began, until the flags ask for another."""
    options = ["--schedule", "wsd", "--learning-rate", "1e-3", "--cooldown-shape", "linear"]
    main(flags("here", *options, "--cooldown-steps", "0", steps=1))
    main(flags("here", *options, "--cooldown-steps", "8", "--continue_train", steps=5))
    latest = tmp_path / "here" / "0.05" / "checkpoint_latest.pth.tar"
    piece = tmp_path / "piece.safetensors"
    export.main([str(latest), str(piece), "--for-training"])

    def rates(name, cooldown_steps, steps=9):
        onwards = ["--checkpoint", str(piece), "--continue_train"]
        onwards += ["--cooldown-steps", str(cooldown_steps)]
        main(flags(name, *options, *onwards, steps=steps))
        events = EventAccumulator(str(tmp_path / name / "0.05")).Reload()
        return [event.value for event in events.Scalars("train/lr")]

    # It began at step 1, eight steps from the end.
    cooled = [0.5e-3, 0.375e-3, 0.25e-3, 0.125e-3]
    assert rates("in_it", 8) == pytest.approx(cooled)
    # One that is to come later begins from weights that have cooled, as these flags say.
    assert rates("anew", 2) == pytest.approx([1e-3, 1e-3, 1e-3, 0.5e-3])
    assert load(tmp_path / "anew")["cooldown_from"] == 7
    # So does that of a run that went on in it: what was before it did not travel.
    assert rates("in_it", 2, steps=12) == pytest.approx([*cooled, 1e-3, 1e-3, 0.5e-3])


def test_run_does_not_go_back_behind_a_piece_that_is_given(flags, tmp_path):
    main(flags("here", steps=3))
    piece = tmp_path / "piece.safetensors"
    export.main(
        [str(tmp_path / "here/0.05/checkpoint_latest.pth.tar"), str(piece), "--for-training"]
    )
    onwards = ["--checkpoint", str(piece), "--continue_train"]
    main(flags("there", steps=1))
    with pytest.raises(UsageError, match="is of step 3, later than step 1 of the run in"):
        main(flags("there", *onwards, steps=4))
    assert load(tmp_path / "there")["step"] == 1
    # The same command again, after it was killed, goes on with what it has reached.
    for steps in (4, 5):
        main(flags("new", *onwards, steps=steps))
        assert load(tmp_path / "new")["step"] == steps
    assert "latest.pth.tar, not from" in (tmp_path / "new" / "0.05" / "train.log").read_text()
    piece.unlink()  # which is not needed any more
    main(flags("new", *onwards, steps=6))
    assert load(tmp_path / "new")["step"] == 6


def test_run_that_started_from_weights_goes_on_with_its_own_steps(flags, tmp_path):
    """However many steps another run had taken for those weights."""
    main(flags("long", steps=3))
    start = ["--checkpoint", str(tmp_path / "long" / "0.05" / "checkpoint_latest.pth.tar")]
    main(flags("run", *start, steps=1))
    for steps in (2, 3):
        main(flags("run", *start, "--continue_train", steps=steps))
        assert load(tmp_path / "run")["step"] == steps


def test_run_goes_back_to_its_own_state_only(flags, tmp_path):
    """Where another run's lies in the place of the one that its cool-down began from."""
    options = ["--schedule", "wsd", "--cooldown-shape", "linear"]
    main(flags("run", *options, "--cooldown-steps", "1", steps=3))
    main(flags("run", *options, "--cooldown-steps", "1", "--seed", "9", steps=2))
    (earlier,) = (tmp_path / "run" / "0.05").glob("*-checkpoint_latest*")
    onwards = ["--checkpoint", str(earlier), "--continue_train"]
    with pytest.raises(UsageError, match=r"began at step 2, and .* is of step 1, of"):
        main(flags("run", *options, *onwards, "--cooldown-steps", "1", steps=4))


def test_run_goes_on_on_another_kind_of_device(flags, tmp_path):
    """On GPUs Adam is fused and counts its steps on the device; on CPUs it is neither."""
    main(flags("whole", steps=2))
    main(flags("moved", steps=1))
    saved = load(tmp_path / "moved")
    for optimizer in (*saved["optimizers"].values(), saved["aux_optimizer"]):
        optimizer["param_groups"][0]["fused"] = True
    torch.save(saved, tmp_path / "moved" / "0.05" / "checkpoint_latest.pth.tar")
    main(flags("moved", "--continue_train", steps=2))
    moved, whole = load(tmp_path / "moved"), load(tmp_path / "whole")
    torch.testing.assert_close(moved["optimizers"], whole["optimizers"], rtol=0, atol=0)
    torch.testing.assert_close(moved["aux_optimizer"], whole["aux_optimizer"], rtol=0, atol=0)


def test_run_stops_when_its_minutes_are_over(flags, tmp_path):
    main(flags("run", "--max-minutes", "1e-9", steps=1000))
    assert load(tmp_path / "run")["step"] == 1
    log = (tmp_path / "run" / "0.05" / "train.log").read_text()
    assert "--max-minutes 1e-09 are over" in log
    assert "stopped at step 1" in log
    main(flags("run", "--max-minutes", "60", "--continue_train", steps=2))
    assert load(tmp_path / "run")["step"] == 2


@pytest.mark.parametrize("val_every", ["2", "3"])
def test_sigterm_saves_and_ends_the_run_well(flags, tmp_path, monkeypatch, val_every):
    """Also where it comes in place of a validation, which is then made up for."""
    main(flags("whole", "--val-every", val_every))
    take_step, calls = train.Step.__call__, []

    def step_and_signal(step, *args):
        calls.append(step)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train.Step, "__call__", step_and_signal)
        main(flags("stopped", "--val-every", val_every))  # returns: exit code 0
    assert load(tmp_path / "stopped")["step"] == 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    main(flags("stopped", "--val-every", val_every, "--continue_train"))
    assert_same_run(load(tmp_path / "stopped"), load(tmp_path / "whole"))


def test_workers_cache_and_recomputation_change_nothing(flags, tmp_path):
    main(flags("plain", "--ema", "0.5", steps=2))
    main(flags("other", "--ema", "0.5", "-n", "2", "--cache", "--grad-checkpoint", steps=2))
    assert_same_run(load(tmp_path / "other"), load(tmp_path / "plain"))


# How gradients are averaged beside CUDA graphs, without a GPU to capture one.
AS_WITH_GRAPHS = """
import train, utils

train.GraphedPasses = lambda function, example: function
train.GraphedUpdate = lambda optimizers: lambda: [each.step() for each in optimizers]

parse_args = train.parse_args
def with_graphs(argv=None):
    args = parse_args(argv)
    args.cuda_graph = True
    return args
train.parse_args = with_graphs
utils.run_main(train.main)
"""
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def run_two_processes(script, *argv, code=0):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = run_script([*launcher, str(script)], *argv, PYTHONPATH=path)
    assert result.returncode == code, result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("script", "machine"),
    [
        ("train.py", ["--grad-checkpoint"]),
        (AS_WITH_GRAPHS, []),
        pytest.param("train.py", ["--cuda", "--grad-checkpoint"], marks=needs_two_gpus),
        pytest.param("train.py", ["--cuda", "--cuda-graph"], marks=needs_two_gpus),
    ],
    ids=["cpu", "cpu-averaged", "gpu", "gpu-graphs"],
)
def test_two_processes_equal_one_with_both_batches(flags, tiny, tmp_path, script, machine):
    options = ["--val-every", "1", "--seed", "1", "--optimizer", "muon", *machine]
    main(flags("one", *options, "--batch-size", "4", steps=5))
    if script == AS_WITH_GRAPHS:
        script = tmp_path / "as_with_graphs.py"
        script.write_text(AS_WITH_GRAPHS)
    run_two_processes(script, *flags("two", *options, steps=5))
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    # On GPUs: TF32, and kernels chosen by the size of the batch. Processes that did not average,
    # or drew noise of their own, would be 0.05 off.
    tolerance = 1e-3 if "--cuda" in machine else 1e-5
    for a, b in zip(one["history"], two["history"], strict=True):
        assert b == pytest.approx(a, rel=tolerance)
    assert torch.equal(one["rng"]["cpu"], two["rng"]["cpu"])
    assert one["global_batch"] == two["global_batch"] == 4
    if "--cuda" in machine:  # Muon computes in bfloat16 there
        return

    start = torch.load(tiny, weights_only=True)["state_dict"]

    def distance(x, y, quantiles):
        keys = [k for k in start if start[k].numel() and k.endswith("quantiles") == quantiles]
        return sum((x[key] - y[key]).double().square().sum() for key in keys) ** 0.5

    # Gradients are summed in another order, and Adam divides those next to zero by their size.
    # The quantiles, which the auxiliary loss trains, move a thousand times as far as all weights.
    for quantiles, allowed in ((False, 1e-2), (True, 1e-3)):
        moved = distance(one["net"], start, quantiles)
        assert distance(one["net"], two["net"], quantiles) < allowed * moved


AVERAGE_AND_SHARE = """
import torch
from training.distributed import Processes

def own(rank):
    kernel = torch.arange(24.0).view(2, 3, 2, 2) * (rank + 1)
    return [kernel.to(memory_format=torch.channels_last), torch.full((), float(rank))]

with Processes(cuda=False) as processes:
    vector = torch.arange(24.0) * (processes.rank + 1)
    processes.average(vector)
    assert torch.equal(vector, torch.arange(24.0) * 1.5), vector
    tensors = own(processes.rank)
    versions = [tensor._version for tensor in tensors]
    processes.share(tensors)
    assert all(map(torch.equal, tensors, own(0))), tensors
    # What was read of them before is known to be old.
    assert all(t._version > version for t, version in zip(tensors, versions, strict=True))
"""


def test_processes_average_and_share_tensors(tmp_path):
    script = tmp_path / "average_and_share.py"
    script.write_text(AVERAGE_AND_SHARE)
    run_two_processes(script)


def test_processes_draw_parts_of_one_batch():
    drop = DropPath(0.5).train()

    def draw(batch):
        torch.manual_seed(0)
        channels_last = torch.empty(batch, 6, 4, 4).to(memory_format=torch.channels_last)
        return [
            torch.empty_like(channels_last).uniform_(-0.5, 0.5),
            drop(torch.ones(batch, 1, 1, 1)),
            torch.empty(6, 1, batch * 16).uniform_(-0.5, 0.5).view(6, batch, 16).movedim(1, 0),
        ]

    whole = draw(6)
    state = torch.get_rng_state()
    for rank in range(3):
        with GlobalDraws(rank, 3):
            parts = draw(2)
        assert torch.equal(torch.get_rng_state(), state)
        for part, full in zip(parts, whole, strict=True):
            assert torch.equal(part, full[2 * rank : 2 * rank + 2])


def test_bf16_is_close_to_float32(flags, tmp_path):
    main(flags("float32", steps=2))
    main(flags("bf16", "--amp", "bf16", steps=2))
    a, b = load(tmp_path / "float32"), load(tmp_path / "bf16")
    assert b["history"][0]["loss"] == pytest.approx(a["history"][0]["loss"], rel=0.01)
    assert all(p.isfinite().all() for p in b["net"].values())
    assert all(p.dtype != torch.bfloat16 for p in b["net"].values())
    assert any(not torch.equal(b["net"][key], a["net"][key]) for key in a["net"])


def test_ema_is_a_mean_of_the_weights_and_is_what_is_used(flags, tmp_path):
    main(flags("run", "--ema", "0.9", "--save-every", "1", steps=1))
    first = load(tmp_path / "run")["net"]
    main(flags("run", "--ema", "0.9", "--continue_train", steps=2))
    end = load(tmp_path / "run")
    key = "g_a.0.weight"
    weight = (end["ema"][key] - first[key]) / (end["net"][key] - first[key])
    assert 0.1 < weight.median() < 0.9
    torch.testing.assert_close(
        end["ema"][key], first[key].lerp(end["net"][key], weight.median()), rtol=0, atol=1e-6
    )
    assert torch.equal(end["state_dict"][key], end["ema"][key])


def test_fine_tuning_starts_anew_and_keeps_the_run_before(flags, tmp_path):
    main(flags("run", steps=2))
    before = load(tmp_path / "run")
    start = tmp_path / "run" / "0.05" / "checkpoint_best.pth.tar"
    main(flags("run", "--checkpoint", str(start), "--learning-rate", "1e-5", steps=1))
    after = load(tmp_path / "run")
    assert after["step"] == 1
    moved = (after["net"]["g_a.0.weight"] - before["net"]["g_a.0.weight"]).abs().max()
    assert 0 < moved < 2e-5
    (kept,) = (tmp_path / "run" / "0.05").glob("*-checkpoint_latest.pth.tar")
    assert torch.load(kept, weights_only=True)["step"] == 2


def test_other_loss_is_judged_anew(flags, tmp_path):
    """Losses at lambda 0.5 are about ten times those at 0.05, and still one is the best."""
    main(flags("run", steps=1))
    start = str(tmp_path / "run" / "0.05" / "checkpoint_latest.pth.tar")
    main(flags("run", "--checkpoint", start, "--continue_train", "--lambda", "0.5", steps=2))
    best = torch.load(tmp_path / "run" / "0.5" / "checkpoint_best.pth.tar", weights_only=True)
    assert best["history"][-1]["loss"] > load(tmp_path / "run")["best_loss"]
    assert [entry["step"] for entry in best["history"]] == [2]


def test_published_command_line_is_accepted():
    line = "--cuda -d ROOT -n 128 --lambda 0.05 --epochs 500 --lr_epoch 450 490 --batch-size 8"
    line += " --save_path DIR --save --checkpoint FILE --continue_train"
    args = train.parse_args(line.split())
    assert (args.lmbda, args.lr_epoch, args.num_workers) == (0.05, [450, 490], 128)
    assert args.save
    assert args.learning_rate == 1e-4
    assert not train.parse_args(["-d", "ROOT", "--no-save"]).save


def test_workers_are_capped_with_one_line(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(training_data, "available_cpus", lambda processes: 1)
    main(flags("run", "-n", "128", "--no-save", steps=1))
    log = (tmp_path / "run" / "0.05" / "train.log").read_text()
    assert log.count("1 workers in place of 128") == 1
    assert not list((tmp_path / "run").glob("*/*.pth.tar"))


def poison(monkeypatch, is_bad):
    """Make the loss of the n-th batch (from 0) NaN where is_bad(n)."""
    forward, count = RateDistortionLoss.forward, iter(range(1000))

    def poisoned(criterion, *args):
        terms = forward(criterion, *args)
        if torch.is_grad_enabled() and is_bad(next(count)):
            terms["loss"] = terms["loss"] * math.nan
        return terms

    monkeypatch.setattr(RateDistortionLoss, "forward", poisoned)


def test_step_that_is_not_finite_is_skipped_and_its_files_named(flags, tmp_path, monkeypatch):
    poison(monkeypatch, lambda n: n == 1)
    main(flags("run", "--save-every", "1", "--cache", steps=3))
    log = (tmp_path / "run" / "0.05" / "train.log").read_text()
    (line,) = (line for line in log.splitlines() if "not finite" in line)
    assert line.count(".png") + line.count(".jpg") == 2
    end = load(tmp_path / "run")
    assert end["step"] == 3
    assert all(p.isfinite().all() for p in end["net"].values())
    assert {state["step"].item() for state in end["optimizers"]["adam"]["state"].values()} == {2}


def test_ten_bad_steps_in_a_row_end_the_run(flags, monkeypatch):
    poison(monkeypatch, lambda n: n != 1)
    with pytest.raises(DataError, match="10 steps in a row were not finite, the last at step 11"):
        main(flags("run", "--no-save", "--val-every", "100", steps=40))


def test_unreadable_pictures_are_named_and_skipped(flags, data, tmp_path):
    root = tmp_path / "damaged"
    for part in ("train", "test"):
        (root / part).mkdir(parents=True)
        for file in (data / part).iterdir():
            (root / part / file.name).write_bytes(file.read_bytes())
    (root / "train" / "0.jpg").write_bytes((root / "train" / "0.jpg").read_bytes()[:99])
    (root / "test" / "1.png").write_text("no picture")
    main(flags("run", "-d", str(root), "-n", "1", steps=3))
    log = (tmp_path / "run" / "0.05" / "train.log").read_text()
    for name in ("train/0.jpg", "test/1.png"):
        assert sum("skipped" in line and name in line for line in log.splitlines()) == 1
    assert load(tmp_path / "run")["step"] == 3


def test_folder_may_have_any_name(flags, tmp_path):
    name = os.fsdecode(b"run\xff")  # no UTF-8
    main(flags(name, steps=1))
    assert load(tmp_path / name)["step"] == 1


def test_full_disk_is_reported_and_leaves_the_last_checkpoint(flags, tmp_path, monkeypatch):
    save = torch.save

    def fill_disk(state, file):
        if state["step"] in (2, 4):
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", fill_disk)
    options = ["--save-every", "1", "--val-every", "100"]
    with pytest.raises(DataError, match=r"No space left on device.*the last one is kept"):
        main(flags("run", *options, steps=4))
    assert load(tmp_path / "run")["step"] == 3
    assert not list((tmp_path / "run" / "0.05").glob(".checkpoint*"))
    log = (tmp_path / "run" / "0.05" / "train.log").read_text()
    assert "at step 2" in log
    assert "trying again at the next save" in log


def test_best_checkpoint_survives_a_disk_that_was_full_for_the_latest(flags, tmp_path, monkeypatch):
    save, losses = torch.save, iter([8.0, math.nan, 9.0])

    def fill_disk(state, file):
        if state["step"] == 1 and "latest" in file.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", fill_disk)

    def validate(*_):
        means = {"loss": next(losses), "bpp": 1.0, "psnr": 30.0}
        return train.Validation(means, [], stopped=False, failures=[])

    monkeypatch.setattr(train, "validate", validate)
    main(flags("run", "--val-every", "1", steps=3))
    assert load(tmp_path / "run", "best")["step"] == 1
    assert (load(tmp_path / "run")["step"], load(tmp_path / "run")["best_loss"]) == (3, 8.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "expected an integer of at least 1, got '0'"),
        (["--lambda", "x"], "expected a number above 0, got 'x'"),
        (["--lambda", "0"], "expected a number above 0, got '0'"),
        (["--seed", "4294967296"], "expected an integer of at least 0 and below 4294967296"),
        (["--cuda", "--cuda-graph", "--grad-checkpoint"], "no --accumulate or --grad-checkpoint"),
        (["--ema", "1"], "below 1, got '1'"),
        (["--schedule", "cosine", "--cooldown-steps", "9"], "are of --schedule wsd"),
        (
            ["--patch-size", "64", "64", "--patch-schedule", "64"],
            "--patch-schedule: not allowed with argument --patch-size",
        ),
        (["--qualities", "3", "--lambda", "0.01"], "--qualities has lambdas of its own"),
        (["--qualities", "1"], "expected an integer of at least 2, got '1'"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--model", "nothing"], "invalid choice: 'nothing'"),
        (["--type", "ms-ssim"], "--patch-size of at least 161, got 64 64"),
        (["-d", "nowhere"], "nowhere/train is not a folder"),
        (["--checkpoint", "nowhere"], "checkpoint nowhere does not exist"),
        (["--N", "16"], "--N 16 does not fit the checkpoint, whose N is 8"),
        (["--model", "mambavc-light"], "does not fit the checkpoint, whose model is mambavc"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_flag_is_one_line_and_exit_code_2(flags, capsys, options, message):
    if options[-1] == "mambavc-light" and "mambavc-light" not in models.list_models():
        pytest.skip("there is one model only")
    with pytest.raises(SystemExit) as exit_:
        utils.run_main(lambda: main(flags("run", *options)))
    assert exit_.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)
    assert message in line


def test_unwritable_folder_and_missing_gpu_are_usage_errors(flags, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write to .*file"):
        main(flags("file"))
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--cuda was given but PyTorch sees no GPU"):
            main(flags("run", "--cuda"))


@pytest.mark.parametrize("part", ["train", "test"])
def test_folder_without_readable_pictures_is_a_usage_error(flags, data, tmp_path, part):
    root = tmp_path / "data"
    for name in ("train", "test"):
        (root / name).mkdir(parents=True)
        (root / name / "a.png").write_bytes((data / "train" / "1.png").read_bytes())
    (root / part / "a.png").write_text("no picture")
    with pytest.raises(UsageError, match="none of the 1 pictures"):
        main(flags("run", "-d", str(root)))
    (root / part / "a.png").unlink()
    with pytest.raises(UsageError, match="no images in"):
        main(flags("run", "-d", str(root)))


def test_more_processes_than_pictures_is_a_usage_error(data):
    processes = Processes(cuda=False)
    processes.world_size = NUM_TRAIN + 1
    with pytest.raises(UsageError, match="5 training pictures leave some of 6 processes empty"):
        training_data.open_dataset(data, cache=False, processes=processes)


def test_run_does_not_go_on_with_another_batch_or_optimizer(flags):
    main(flags("run", steps=1))
    for options, key in (
        (["--accumulate", "2"], "global_batch: it was 2 and is now 4"),
        (["--optimizer", "muon"], "optimizer: it was adam and is now muon"),
    ):
        with pytest.raises(UsageError, match=key):
            main(flags("run", "--continue_train", *options))


def A_logs(state_dict):
    return {key: value for key, value in state_dict.items() if key.endswith("A_logs")}


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_fixed_A_stays_and_its_run_goes_on(flags, tiny, tmp_path, optimizer):
    options = ["--fixed-A", "--optimizer", optimizer, "--ema", 0.9]
    main(flags("whole", *options))
    main(flags("parts", *options, steps=2))
    main(flags("parts", "--continue_train", *options))
    whole, parts = load(tmp_path / "whole"), load(tmp_path / "parts")
    # Validations need not agree: the one that ended the first part is one more.
    torch.testing.assert_close(parts["net"], whole["net"], rtol=0, atol=0)
    before = torch.load(tiny, weights_only=True)["state_dict"]
    for key, value in A_logs(before).items():
        assert torch.equal(whole["net"][key], value)
        assert torch.equal(whole["state_dict"][key], value)
    assert not torch.equal(whole["net"]["g_a.1.op.Ds"], before["g_a.1.op.Ds"])


def test_run_does_not_go_on_with_another_kind_of_A(flags, tmp_path):
    main(flags("trained", steps=1))
    with pytest.raises(UsageError, match=r"--fixed-A needs A as training starts with it, but g_a"):
        main(flags("trained", "--continue_train", "--fixed-A"))
    main(flags("fixed", "--fixed-A", steps=1))
    with pytest.raises(UsageError, match="fixed_A: it was True and is now False"):
        main(flags("fixed", "--continue_train"))
    # Those of before the flag was there say nothing of it, and go on.
    path = state.checkpoint_path(tmp_path / "trained" / "0.05", "latest")
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["args"]["fixed_A"]
    torch.save(checkpoint, path)
    main(flags("trained", "--continue_train", steps=2))


@pytest.mark.parametrize("key", ["args", "net", "optimizers", "rng"])
def test_damaged_state_is_a_usage_error(flags, tmp_path, key):
    main(flags("run", steps=1))
    state = load(tmp_path / "run")
    torch.save({**state, key: {}}, tmp_path / "run" / "0.05" / "checkpoint_latest.pth.tar")
    with pytest.raises(UsageError, match=r"cannot go on from .*latest.pth.tar, whose state does"):
        main(flags("run", "--continue_train", steps=2))


def test_network_of_all_rates_starts_from_one_of_a_single_rate(flags, tiny, tmp_path):
    main(flags("run", "--qualities", "3", "--learning-rate", "1e-5", steps=1))
    start = torch.load(tiny, weights_only=True)["state_dict"]
    end = load(tmp_path / "run")
    assert (end["net"]["g_a.0.weight"] - start["g_a.0.weight"]).abs().max() < 2e-5
    assert end["model_args"]["qualities"] == 3
    (entry,) = end["history"]
    losses = [entry[f"lambda_{lmbda}/loss"] for lmbda in ("0.0035", "0.013", "0.05")]
    weights = [(0.013 / lmbda) ** 0.5 for lmbda in (0.0035, 0.013, 0.05)]
    expected = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / 3
    assert entry["loss"] == pytest.approx(expected)
    assert entry["bpp"] == pytest.approx(
        sum(entry[f"lambda_{lmbda}/bpp"] for lmbda in ("0.0035", "0.013", "0.05")) / 3
    )
    log = (tmp_path / "run" / "variable" / "train.log").read_text()
    assert f"validation at step 1, lambda 0.013: loss {losses[1]:.4f}" in log

    latest = str(tmp_path / "run" / "variable" / "checkpoint_latest.pth.tar")
    with pytest.raises(UsageError, match="network of all rates; add --qualities 3"):
        main(flags("other", "--checkpoint", latest))
    with pytest.raises(UsageError, match="--qualities 4 does not fit the checkpoint"):
        main(flags("other", "--checkpoint", latest, "--qualities", "4"))
    main(flags("single", steps=1))
    single = str(tmp_path / "single" / "0.05" / "checkpoint_latest.pth.tar")
    with pytest.raises(UsageError, match="another qualities: it was None and is now 3"):
        main(flags("other", "--checkpoint", single, "--qualities", "3", "--continue_train"))


@pytest.mark.parametrize("name", ["fastest", "triton"])
def test_scan_backend_that_cannot_run_is_a_usage_error(flags, monkeypatch, name):
    monkeypatch.setenv("MAMBAVC_SCAN_BACKEND", name)
    with pytest.raises(UsageError, match=f"scan backend '{name}'"):
        main(flags("run", steps=1))


def test_stochastic_depth_of_a_checkpoint_can_be_changed(flags, tmp_path):
    main(flags("run", "--qualities", "3", steps=1))
    state = str(tmp_path / "run" / "variable" / "checkpoint_latest.pth.tar")
    before = load(tmp_path / "run")
    rest = ("--qualities", "3", "--checkpoint", state, "--learning-rate", "1e-30")
    main(flags("other", *rest, "--drop-path", "0.25", steps=1))
    after = load(tmp_path / "other")
    assert before["model_args"]["drop_path_rate"] != 0.25
    assert after["model_args"] == {**before["model_args"], "drop_path_rate": 0.25}
    for key in ("g_a.0.weight", "gains.y_enc"):
        torch.testing.assert_close(after["net"][key], before["net"][key])


def test_crops_are_rotated_and_grow_with_accumulated_batches(flags, monkeypatch):
    """By step, of which each takes several batches."""
    take_step, shapes, seen = train.Step.__call__, [], []

    def spy(step, batches, *args):
        shapes.append([tuple(pixels.shape) for pixels in batches])
        seen.extend(pixels.clone() for pixels in batches)
        return take_step(step, batches, *args)

    monkeypatch.setattr(train.Step, "__call__", spy)
    options = ["--accumulate", "2", "--patch-schedule", "32:0.5,64", "--no-save"]
    main(flags("run", *options, "--rotate", steps=4))
    assert shapes == [[(2, side, side, 3)] * 2 for side in (32, 32, 64, 64)]
    rotated = seen[:]
    seen.clear()
    main(flags("run", *options, steps=4))
    assert not all(map(torch.equal, seen, rotated))


def test_each_sample_has_a_rate_of_its_own(tiny):
    """Weighted so that all rates pull alike; drawn anew by each step."""
    torch.manual_seed(0)
    model = models.build_model("mambavc", **SHALLOW, qualities=3)
    seen = []
    criterion = RateDistortionLoss()

    def spy(output, x, lmbda, weight):
        seen.append(lmbda)
        assert torch.equal(weight, (0.013 / lmbda) ** 0.5)
        return criterion(output, x, lmbda, weight)

    step = train.Step(model, spy, *make_optimizers(model, "adam", 0.0, 0.0), Processes(cuda=False))
    for _ in range(2):
        assert step([torch.zeros(8, 64, 64, 3, dtype=torch.uint8)]).is_finite
    drawn = torch.cat(seen)
    assert len(drawn.unique()) == 16
    assert drawn.min() < 0.01 < 0.02 < drawn.max()
    lowest, highest = model.config["lmbda_range"]
    assert lowest <= drawn.min()
    assert drawn.max() <= highest


def test_second_run_in_a_folder_is_refused(flags, tmp_path, capfd):
    folder = tmp_path / "run" / "0.05"
    with state.own_folder(folder, Processes(cuda=False)):
        half_written = folder / ".checkpoint_latest.pth.tar.1"
        half_written.touch()
        # Forked, to be spared the imports.
        second = multiprocessing.get_context("fork").Process(
            target=lambda: utils.run_main(lambda: main(flags("run")))
        )
        second.start()
        second.join(60)
        assert second.exitcode == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert f"another run is training in {folder}" in line
        assert half_written.exists()
    main(flags("run", "--no-save", steps=1))
    assert not half_written.exists()


def test_all_processes_of_a_second_run_say_one_line(flags, tmp_path):
    with state.own_folder(tmp_path / "run" / "0.05", Processes(cuda=False)):
        errors = run_two_processes("train.py", *flags("run"), code=1)
    assert errors.count("train.py: error: another run is training in") == 1
    assert "run_main" not in errors, "a traceback of ours; the launcher prints one of its own"


def test_run_that_saves_nothing_leaves_the_checkpoints_of_another(flags, tmp_path):
    main(flags("run", steps=1))
    files = sorted((tmp_path / "run" / "0.05").glob("*.pth.tar"))
    main(flags("run", "--no-save", steps=1))
    assert sorted((tmp_path / "run" / "0.05").glob("*.pth.tar")) == files
    assert len(files) == 2


def test_best_of_another_loss_is_kept_beside_the_new_one(flags, tmp_path):
    main(flags("run", steps=1))
    before = load(tmp_path / "run", "best")
    options = ["--type", "ms-ssim", "--patch-size", "161", "161"]
    main(flags("run", "--continue_train", *options, steps=2))
    (kept,) = (tmp_path / "run" / "0.05").glob("*-checkpoint_*.pth.tar")
    kept = torch.load(kept, weights_only=True)
    assert_same_run(kept, before)
    assert [entry["step"] for entry in load(tmp_path / "run", "best")["history"]] == [2]
    assert load(tmp_path / "run")["step"] == 2


def test_weights_of_a_run_started_anew_in_its_folder_are_kept(flags, tmp_path):
    """The checkpoint to go on from holds weights only, so the run starts at step 0."""
    main(flags("run", steps=2))
    folder = tmp_path / "run" / "0.05"
    weights = {k: load(tmp_path / "run")[k] for k in ("model", "model_args", "state_dict")}
    torch.save(weights, folder / "weights.pth.tar")
    options = ["--checkpoint", str(folder / "weights.pth.tar"), "--continue_train"]
    main(flags("run", *options, steps=1))
    assert load(tmp_path / "run")["step"] == 1
    (kept,) = folder.glob("*-checkpoint_latest.pth.tar")
    assert torch.load(kept, weights_only=True)["step"] == 2


def test_ema_may_be_added_and_dropped(flags, tmp_path):
    main(flags("run", steps=1))
    start = load(tmp_path / "run")["net"]
    main(flags("run", "--continue_train", "--ema", "0.9", steps=3))
    end = load(tmp_path / "run")
    key = "g_a.0.weight"
    assert not torch.equal(end["ema"][key], end["net"][key])
    assert (end["ema"][key] - start[key]).norm() < (end["net"][key] - start[key]).norm()
    main(flags("run", "--continue_train", steps=4))
    dropped = load(tmp_path / "run")
    assert dropped["ema"] is None
    main(flags("run", "--continue_train", "--ema", "0.9", steps=5))
    assert load(tmp_path / "run")["ema"] is not None
    assert load(tmp_path / "run")["step"] == 5


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive"),  # oneDNN's way of saying it
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
    ],
    ids=["onednn", "cuda", "python"],
)
def test_too_little_memory_for_a_validation_leaves_the_state(flags, tmp_path, monkeypatch, error):
    def measure(a, b):
        raise error

    options = ["--val-every", "1", "--save-every", "100"]
    with monkeypatch.context() as patch:
        patch.setattr(utils, "psnr", measure)
        with pytest.raises(DataError, match=r"64x64: not enough memory .* --test-batch-size 1"):
            main(flags("run", *options, steps=2))
    assert load(tmp_path / "run")["step"] == 1
    main(flags("run", *options, "--continue_train", steps=2))
    assert [entry["step"] for entry in load(tmp_path / "run")["history"]] == [1, 2]


def test_run_that_is_over_says_so(flags, tmp_path):
    main(flags("run", steps=2))
    latest = tmp_path / "run" / "0.05" / "checkpoint_latest.pth.tar"
    before = latest.read_bytes()
    for steps in (2, 1):
        main(flags("run", "--continue_train", steps=steps))
        log = (tmp_path / "run" / "0.05" / "train.log").read_text()
        assert f"nothing to do: the run has taken 2 of {steps} steps" in log
        assert latest.read_bytes() == before


def largest_move(before, after, quantiles=False):
    keys = [k for k in before if before[k].is_floating_point() and before[k].numel()]
    keys = [k for k in keys if k.endswith("quantiles") == quantiles and "_cdf" not in k]
    return max((after[key] - before[key]).abs().max().item() for key in keys)


def test_learning_rates_and_clipping_are_those_of_the_flags(flags, tiny, tmp_path):
    """Adam's first step moves each weight by the learning rate or a little less."""
    start = checkpoint_file.load_model(tiny).state_dict()  # with solved quantiles, of up to 200
    options = ["--warmup-steps", "9", "--learning-rate", "1e-3", "--aux-learning-rate", "1e-2"]
    main(flags("run", *options, "--clip_max_norm", "0", steps=1))
    first = load(tmp_path / "run")["net"]
    # Weights of about 1 are exact to 6e-8, those quantiles to 8e-6.
    assert largest_move(start, first) == pytest.approx(1e-4, rel=0.01)
    assert largest_move(start, first, quantiles=True) == pytest.approx(1e-2, rel=0.01)
    # The first step of a command that goes on already has its rates.
    options = ["--learning-rate", "1e-6", "--aux-learning-rate", "1e-9", "--continue_train"]
    main(flags("run", *options, steps=2))
    assert 0 < largest_move(first, load(tmp_path / "run")["net"]) < 2e-6
    assert largest_move(first, load(tmp_path / "run")["net"], quantiles=True) == 0
    # Gradients far below Adam's epsilon of 1e-8 move nothing.
    main(flags("clipped", "--clip_max_norm", "1e-12", steps=1))
    assert largest_move(start, load(tmp_path / "clipped")["net"]) < 1e-6
    assert largest_move(start, load(tmp_path / "clipped")["net"], quantiles=True) > 1e-4


def test_epochs_are_passes_over_the_pictures(flags, tmp_path):
    """Five pictures in batches of two: epochs end after 2.5 and 5 steps."""
    command = flags("run", "--epochs", "2", "--lr_epoch", "1")
    at = command.index("--max-steps")
    main(command[:at] + command[at + 2 :])
    assert load(tmp_path / "run")["step"] == 5
    assert [entry["step"] for entry in load(tmp_path / "run")["history"]] == [3, 5]
    events = EventAccumulator(str(tmp_path / "run" / "0.05")).Reload()
    rates = [event.value for event in events.Scalars("train/lr")]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-4, 1e-5, 1e-5])


def test_validation_measures_the_mean_of_the_weights_picture_by_picture(
    flags, data, tmp_path, monkeypatch
):
    root = tmp_path / "data"
    (root / "test").mkdir(parents=True)
    (root / "train").symlink_to(data / "train")
    for name, source in (("a", "0.jpg"), ("b", "0.jpg"), ("c", "1.png")):
        shutil.copy(data / "test" / source, root / "test" / f"{name}{Path(source).suffix}")
    validate, sizes = train.validate, []

    def spy(model, batches, *args):
        sizes.append([len(pixels) for pixels in batches])
        return validate(model, batches, *args)

    monkeypatch.setattr(train, "validate", spy)
    options = ["--ema", "0.9", "--learning-rate", "1e-2", "--test-batch-size", "2"]
    main(flags("run", "-d", str(root), *options, steps=3))
    assert sizes == [[2, 1]]
    state_dicts = load(tmp_path / "run")
    criterion = RateDistortionLoss(0.05)
    model = models.build_model("mambavc", **state_dicts["model_args"]).eval()
    losses = {}
    for key in ("ema", "net"):
        model.load_state_dict(state_dicts[key])
        files = sorted((root / "test").iterdir())
        pictures = [utils.to_tensor(utils.read_image(file))[None] for file in files]
        with torch.no_grad():
            terms = [criterion(model(x), x)["loss"].item() for x in pictures]
        losses[key] = sum(terms) / len(terms)
    # Convolutions of a batch of two sum in another order.
    assert state_dicts["history"][0]["loss"] == pytest.approx(losses["ema"], rel=1e-4)
    assert losses["net"] != pytest.approx(losses["ema"], rel=1e-2)


def test_compiled_transforms_are_used_in_training_only(flags, tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile_(function, **options):
        compiled.append(options)

        def run(*args):
            calls.append(torch.is_grad_enabled())
            return function(*args)

        return run

    main(flags("plain", steps=2))
    monkeypatch.setattr(torch, "compile", compile_)
    main(flags("compiled", "--compile", steps=2))
    assert compiled == [{"dynamic": False}] * 5
    assert sum(calls) == 5 * 2
    assert_same_run(load(tmp_path / "compiled"), load(tmp_path / "plain"))


class OneWeight(torch.nn.Module):
    """A codec of one weight, whose gradients are known: x_hat = w x, aux loss = (q - 1)^2."""

    qualities = 0

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.5))
        self.q = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, x, quality):
        return {"x_hat": self.w * x}

    def aux_loss(self):
        return (self.q - 1) ** 2


@pytest.mark.parametrize("clip", [math.inf, 0.01])
def test_step_is_one_of_the_mean_loss(clip):
    """However it is parted; with gradient descent, which shows the size of a gradient."""
    pixels = torch.randint(256, (4, 2, 3, 3), dtype=torch.uint8)

    def criterion(output, x):
        mse = (output["x_hat"] - x).square().mean()
        return {"loss": mse, "bpp_loss": mse * 2, "mse_loss": mse}

    x = pixels.double() / 255
    gradient = (2 * (0.5 * x - x) * x).mean().item()
    for parts in (1, 2, 4):
        model = OneWeight()
        step = train.Step(
            model,
            criterion,
            {"net": torch.optim.SGD([model.w], lr=0.1)},
            torch.optim.SGD([model.q], lr=0.25),
            Processes(cuda=False),
            clip=clip,
        )
        measured = step(list(pixels.chunk(parts)))
        clipped = math.copysign(min(abs(gradient), clip), gradient)
        assert model.w.item() == pytest.approx(0.5 - 0.1 * clipped, rel=1e-5)
        assert model.q.item() == pytest.approx(3 - 0.25 * 4)
        assert measured.grad_norm == pytest.approx(abs(gradient), rel=1e-5)
        assert measured.mse == pytest.approx((0.25 * x * x).mean().item(), rel=1e-5)
        assert measured.bpp == pytest.approx(2 * measured.loss)
        assert measured.is_finite
        assert model.w.grad is None
