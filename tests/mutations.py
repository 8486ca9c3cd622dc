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
CODEC = "tests/test_codec.py"
EVAL = "tests/test_eval.py"
CODEC_TILES = "tests/test_codec_tiles.py"
TILES = "tests/test_models_tiles.py"
CODING = "tests/test_models_coding.py"
CHECKPOINT = "tests/test_models_checkpoint.py"
GAINS = "tests/test_models_gains.py"
UTILS = "tests/test_utils.py"
SS2D = "tests/test_layers_ss2d.py"
# One fault in one or two lines reads better than ruff's seven.
# fmt: off
FAULTS = [
    # Tiles.
    Fault("models/tiles.py", "windows(parts, margin, LATENT, parts[-1][1])",
          "windows(parts, 0, LATENT, parts[-1][1])", TILES, "margin_brings"),
    Fault("models/tiles.py", "if damaged and not salvage:", "if False:", TILES, "reads_no_other"),
    Fault("models/grid.py", "+ 2 * margin", "+ margin", TILES, "windows"),
    Fault("models/container.py", "_CHECKSUMS.pack(seed, number)", "_CHECKSUMS.pack(seed, 0)", TILES,
          "other_places"),
    Fault("models/container.py", "if reader.left and not salvage:", "if False:", TILES,
          "noticed_and_named"),
    Fault("models/memory.py", "max(READING_BYTES * pixels, PICTURE", "max(0, PICTURE", CODEC_TILES,
          "do_not_fit"),
    Fault("codec.py", "    if damage:", "    if False:", CODEC_TILES, "salvaged"),
    Fault("codec.py", "elif height * width > MAX_WHOLE_PIXELS or args.max_memory:",
          "elif height * width > MAX_WHOLE_PIXELS:", CODEC_TILES, "under_its_limit"),
    # The step.
    Fault("train.py", 'loss = terms["loss"] / parts', 'loss = terms["loss"]', TRAIN, "mean_loss"),
    Fault("train.py", "self.clip)", "math.inf)", TRAIN, "mean_loss"),
    Fault("train.py", ".detach() / parts", ".detach()", TRAIN, "mean_loss"),
    Fault("train.py", "loss = loss + self.model.aux_loss()", "pass", TRAIN, "mean_loss"),
    Fault("train.py", "if is_finite and not self.graphs:", "if not self.graphs:", TRAIN,
          "finite_is_skipped"),
    # Flags that are ignored or misread.
    Fault("train.py", "args.clip_max_norm or math.inf", "math.inf", TRAIN, "learning_rates"),
    Fault("train.py", "args.warmup_steps)", "0)", TRAIN, "learning_rates"),
    Fault("train.py", "= args.learning_rate, args.aux_", "= args.learning_rate, 0 * args.aux_",
          TRAIN, "learning_rates"),
    Fault("train.py", "[epoch * epoch_steps for epoch in args.lr_epoch]", "args.lr_epoch", TRAIN,
          "epochs_are"),
    Fault("train.py", "math.ceil(args.epochs * epoch_steps)",
          "args.epochs * math.ceil(epoch_steps)", TRAIN, "epochs_are"),
    Fault("train.py", "test_pictures, args.test_batch_size", "test_pictures, 1", TRAIN,
          "by_picture"),
    Fault("training/state.py", "        if compiled:", "        if False:", TRAIN, "compiled"),
    # Validation.
    Fault("train.py", "judge(run.used_model)", "judge(run.model)", TRAIN, "by_picture"),
    Fault("training/validation.py", "                    rows.append(row)",
          "                rows.append(row)", TRAIN, "by_picture"),
    Fault("training/validation.py", 'row["loss"] * rate_weight(row["lmbda"])', 'row["loss"]', TRAIN,
          "starts_from_one"),
    Fault("train.py", "bool(stopped or failures or", "bool(stopped or", TRAIN, "too_little"),
    # Going on.
    Fault("train.py", 'group["lr"] = rate', 'group.setdefault("lr", rate)', TRAIN,
          "learning_rates"),
    Fault("training/state.py", '("lr", "fused", "foreach")', '("fused", "foreach")', TRAIN,
          "learning_rates"),
    Fault("training/state.py", 'checkpoint["ema"] or checkpoint["net"]',
          'checkpoint["ema"] or self.ema.module.state_dict()', TRAIN, "added_and_dropped"),
    Fault("training/log.py", "if run.step > self.total_steps or", "if", TRAIN, "is_over"),
    Fault("training/state.py", "or cooldown_start <= began", "or True", TRAIN, "longer_run"),
    Fault("training/state.py", "if source != stable:", "if True:", TRAIN, "longer_run"),
    Fault("training/state.py", "self.step = self.fresh_from =", "self.step =", TRAIN, "elsewhere"),
    Fault("training/state.py", 'checkpoint.get("cooldown_from")\n        best,',
          "None\n        best,", TRAIN, "that_never_was"),
    Fault("training/state.py", 'checkpoint.get("cooldown_from")\n        if not',
          "None\n        if not", TRAIN, "goes_on_in_it"),
    Fault("training/state.py", 'if "optimizers" not in checkpoint or', "if", TRAIN,
          "goes_on_in_it"),
    Fault("training/state.py", 'or began < checkpoint.get("fresh_from", 0)', "", TRAIN,
          "goes_on_in_it"),
    Fault("train.py", "max(cooldown_start, run.cooldown_from or 0)", "cooldown_start", TRAIN,
          "any_point"),
    Fault("training/state.py", 'self.fresh_from = checkpoint.get("fresh_from", 0)', "pass", TRAIN,
          "elsewhere"),
    # Crops and rates.
    Fault("train.py", "batch // args.accumulate", "batch", TRAIN, "accumulated_batches"),
    Fault("training/crops.py", "= columns[::-1], rows", "= columns, rows",
          "tests/test_training_crops.py", "orientation"),
    Fault("train.py", "args.seed, args.rotate)", "args.seed)", TRAIN, "rotated"),
    Fault("train.py", "of_rate = lmbda, rate_weight(lmbda)", "of_rate = (lmbda,)", TRAIN,
          "rate_of_its_own"),
    # Other runs' files.
    Fault("training/state.py", "fcntl.LOCK_EX", "fcntl.LOCK_UN", TRAIN, "second_run"),
    Fault("train.py", "folder if args.save and processes", "folder if processes", TRAIN,
          "saves_nothing"),
    Fault("training/state.py", "if path.exists() and path.resolve() not in superseded:",
          "if False:", TRAIN, "another_loss or started_anew"),
    Fault("training/state.py", "            self._superseded.add(",
          "        self._superseded.add(", TRAIN, "another_loss"),
    Fault("training/state.py", "processes.gather(problems)", "problems", TRAIN, "of_a_second_run"),
    # Coding.
    Fault("models/coding.py", "x_hat.clamp(0, 1)", "(1 - x_hat.flip(-1)).clamp(0, 1)", CODEC,
          "is_the_original"),
    Fault("models/coding.py", "coded = self.compress(x, quality)",
          "coded = self.compress(0 * x, quality)", CODEC, "is_the_original"),
    Fault("models/coding.py", "exact=stream.exact", "exact=True", CODING, "file_decodes"),
    Fault("models/coding.py", "part.to(dtype=torch.float64", "part.to(dtype=torch.float32", CODING,
          "float64"),
    Fault("models/coding.py", "if crcs is not None and", "if False and", CODING, "fast_file"),
    Fault("models/coding.py", "if stream.fingerprint != self.fingerprint:", "if False:", CODING,
          "of_another_model"),
    Fault("models/coding.py", "if not x_hat.isfinite().all():", "if False:", CODING,
          "to_no_picture"),
    Fault("models/entropy.py", "guards += zip(positions.tolist(),", "zip(positions.tolist(),",
          CODING, "slightly_other"),
    Fault("models/base.py", "_transform(self.g_s, scaled(y_hat, y_dec), precision)",
          "self.g_s(scaled(y_hat, y_dec))", CODING, "either_precision"),
    Fault("models/base.py", "enabled=is_block)", "enabled=True)", CODING, "either_precision"),
    Fault("kernels/conv_chain_triton.py", "tl.float64 if out.dtype", "tl.float32 if out.dtype",
          CODING, "by_kernels"),
    # Networks of every rate.
    Fault("models/base.py", "h_a(y), z_enc)", "h_a(y), None)", GAINS, "folded"),
    Fault("models/base.py", "layer.bias.copy_(layer.bias * factor)", "pass", GAINS, "folded"),
    Fault("models/gains.py", ".clamp(0, 100) *", " *", GAINS, "interpolated"),
    Fault("models/coding.py", "  rounded_gain.y_dec,", "  None,", GAINS, "estimated"),
    Fault("models/coding.py", '"gains.z_enc")', '"gains.")', GAINS, "fingerprint"),
    Fault("models/coding.py", "if (stream.quality is None) != (self._gains is None):",
          "if False:", GAINS, "version_is_not"),
    Fault("models/container.py", "check_quality(steps / QUALITY_STEPS)", "steps / QUALITY_STEPS",
          "tests/test_models_container.py", "hostile"),
    Fault("models/search.py", "excesses[other] /= 2", "pass", "tests/test_models_search.py",
          "within_the_range"),
    Fault("codec.py", "value * math.log(10) / 10", "value", CODEC, "within_a_percent"),
    Fault("eval.py", "for low, high in zip(*pair, strict=True))", "for low, high in [pair])", EVAL,
          "does_not_help"),
    # The codec on the command line.
    Fault("codec.py", "or not args.fast_entropy", "or True", CODEC, "is_the_original"),
    Fault("codec.py", "select_device(args.cuda)", "select_device(False)", CODEC, "cuda"),
    Fault("codec.py", "chosen_precision(args.precision,", "chosen_precision(None,", CODEC,
          "precision_is"),
    Fault("codec.py", "if args.verify:", "if False:", CODEC, "failed_verification"),
    Fault("codec.py", "if not force:", "if False:", CODEC, "unless_forced"),
    Fault("codec.py", "if job.source and job.target.samefile", "if False and job.target.samefile",
          CODEC, "bad_usage"),
    Fault("codec.py", "check_memory(load().model, stream.height, stream.width)", "pass", CODEC,
          "for_the_memory"),
    Fault("codec.py", "if not same:", "if False:", CODEC, "lose_quality"),
    Fault("codec.py", "failed += 1", "pass", CODEC, "several_inputs"),
    # Evaluation.
    Fault("eval.py", "exact=not args.fast_entropy", "exact=True", EVAL, "coded_as_asked"),
    Fault("eval.py", ", precision=coder.precision)", ", precision=torch.float32)", EVAL,
          "say_the_precision"),
    Fault("eval.py", "graphs=args.cuda_graph, precision=precision", "graphs=args.cuda_graph", EVAL,
          "say_the_precision"),
    Fault("eval.py", "select_device(args.cuda)", "select_device(False)", EVAL, "cuda"),
    Fault("eval.py", '{"float32": 0.01', '{"float32": 10', EVAL, "another_picture"),
    Fault("eval.py", "if excess > MAX_RATE_EXCESS:", "if False:", EVAL, "rate_above"),
    Fault("eval.py", "    if estimate:", "    if False:", EVAL, "expected_ones"),
    Fault("eval.py", "fmean(column)", "column[0]", EVAL, "expected_ones"),
    Fault("eval.py", "to_image(x_hat[0])", "to_image(x[0])", EVAL, "reconstructions"),
    Fault("eval.py", "if overwrites or", "if False and", EVAL, "never_overwritten"),
    Fault("eval.py", "problems[file.name] = str(error)", "pass", EVAL, "skipped_named"),
    Fault("eval.py", "None if value == math.inf else value", "value", EVAL, "every_reader"),
    # The kernel of a fixed A, where A is not.
    Fault("layers/ss2d.py", "and version == A_logs._version", "", SS2D, "changed_A"),
    Fault("layers/ss2d.py", "and values.data_ptr() == A_logs.data_ptr()", "", SS2D,
          "changed_A or rounded"),
    Fault("layers/ss2d.py", "return type(self), ()", "return object.__reduce_ex__(self, 2)", SS2D,
          "copies"),
    Fault("layers/ss2d.py", "self._is_fixed.forget()", "pass", SS2D, "changed_A or compiled"),
    Fault("layers/ss2d.py", "if torch.compiler.is_compiling():", "if False:", SS2D, "compiled"),
    Fault("layers/ss2d.py", "rtol=2**-22, atol=0", "rtol=1e-3, atol=1e-3", SS2D, "other_value"),
    Fault("kernels/scan.py", "fixed_A = dtype == torch.float32", "pass",
          "tests/test_kernels_scan.py", "in_float64"),
    Fault("models/checkpoint.py", "and is_fixed(value)", "and False", CHECKPOINT,
          "saved_weights"),
    # Checkpoints.
    Fault("models/checkpoint.py", "state_dict[key] = kept.contiguous()",
          "state_dict[key] = kept.contiguous() * 0", CHECKPOINT, "saved_weights"),
    Fault("models/checkpoint.py", "if is_exact or not half.isfinite().all()", "if is_exact",
          CHECKPOINT, "beyond_half"),
    Fault("models/checkpoint.py", "recorded is not None and", "False and", CHECKPOINT, "recorded"),
    Fault("models/weights.py", "if found != digest:", "if False:", CHECKPOINT,
          "parts_that_are_not"),
    Fault("models/weights.py", "if tensors.keys() != keys:", "if False:", CHECKPOINT, "lies"),
    Fault("models/weights.py", "name != os.path.basename(name) or ", "", CHECKPOINT, "lies"),
    Fault("models/weights.py", "            size = HEADER_BYTES", "            size = -10**6",
          CHECKPOINT, "in_parts_are_those"),
    Fault("models/weights.py", "*before} - written", "*before} & written", CHECKPOINT, "anew"),
    Fault("models/checkpoint.py", "if not value.isfinite().all():", "if False:", CHECKPOINT,
          "damaged_weights"),
    Fault("models/checkpoint.py", "if not fits:", "if False:", CHECKPOINT,
          "do_not_go_with and 12.0"),
    Fault("models/checkpoint.py", "weights_only=True", "weights_only=False", CHECKPOINT,
          "is_not_run"),
    Fault("models/entropy.py", "if not (rising and", "if not (", CHECKPOINT, "damaged_weights"),
    Fault("tools/export.py", "build_from_checkpoint(checkpoint, args.checkpoint)", "pass",
          "tests/test_tools_export.py", "could_not_be_loaded"),
    # Pictures and files.
    Fault("utils.py", "bar.update()", "pass", UTILS, "a_bar_with_names"),
    Fault("utils.py", "leave=False", "leave=True", UTILS, "clean"),
    Fault("utils.py", "all(os.get_terminal_size(sys.stderr.fileno()))", "True", UTILS,
          "without_a_size"),
    Fault("training/log.py", "self._has_originals = True", "pass", TRAIN, "lowers_the_loss"),
    Fault("models/coding.py", "and layer.groups == 1", "", CODING, "any_kind"),
    Fault("utils.py", "+ 128) // 257", ") // 257", UTILS, "16_bit"),
    Fault("utils.py", "x.mul(255).round()", "x.mul(255)", UTILS, "8_bit_samples"),
    Fault("utils.py", "if not x.isfinite().all():", "if False:", UTILS, "no_sample_stands"),
    Fault("utils.py", "return converted,", "return plain,", UTILS, "another_profile"),
    Fault("utils.py", "temporary.chmod(", "int(0 and ", UTILS, "permissions"),
    Fault("utils.py", "path = Path(os.path.realpath(path))", "pass", UTILS, "behind_a_link"),
    Fault("utils.py", "errno.ENOSPC, errno", "errno", EVAL, "full_disk"),
]
# fmt: on


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
    if not chosen:
        sys.exit(f"no fault has all of these words: {' '.join(sys.argv[1:])}")
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        ignored = shutil.ignore_patterns(".git", "__pycache__", "pic", "runs", "out", ".venv*")
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
