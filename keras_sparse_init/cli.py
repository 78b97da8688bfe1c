"""The command `keras-sparse-init`. Reading the command line imports neither TensorFlow nor gin nor NumPy."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from keras_sparse_init._version import __version__

_TRAIN_CONFIG = "lenet5/scratch.gin"
_SIGNAL_CONFIG = "signal.gin"
_COMPARE_CONFIG = "compare.gin"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The arguments. None takes those of the process.

    Returns:
        The exit code: 0, or 2 for bad input, 1 for a run that failed, 130 for an interrupt.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", code=130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keras-sparse-init", description="Sparse networks: trains, measures, compares."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        help="train a sparse network as a gin config says",
        description="Trains a sparse network as a gin config says, and writes the results to a directory.",
        epilog='Example: keras-sparse-init train --gin_file mlp/scratch.gin --gin_bindings "SPARSITY=0.9" '
        "--gin_bindings \"INIT='layer'\" --output_dir runs/mine",
    )
    _add_config_arguments(
        train,
        _TRAIN_CONFIG,
        names="DATA, STEPS, BATCH, LEARNING_RATE, SEED, where a config has them also "
        "SPARSITY, METHOD, INIT, PRUNED_RUN",
        example="train.log_every=50 or dynamic.frequency=50",
        directory="a new or empty directory, or that of the same job, interrupted, which then goes on",
    )
    train.set_defaults(command=_train)

    signal = commands.add_parser(
        "signal",
        help="measure how much of the signal reaches the output of sparse networks",
        description="Measures the standard deviations of activations in sparse LeNet-5 networks at initialization, for "
        "families of masks, sparsities and ways to scale the kernels; prints a table and writes CSV, JSON and plots.",
        epilog='Example: keras-sparse-init signal --gin_bindings "REPEATS=10" --output_dir runs/signal',
    )
    _add_config_arguments(
        signal,
        _SIGNAL_CONFIG,
        names="MASKS, SPARSITIES, INITS, REPEATS, INPUTS, SEED",
        example="signal.scale=1.0",
        directory="a new or empty directory",
    )
    signal.set_defaults(command=_signal)

    compare = commands.add_parser(
        "compare",
        help="compare initializers on a stack of affine layers",
        description="Measures signal and gradient of initializers layer by layer on a stack of affine layers, at "
        "initialization and in the epochs of SGD after it; prints a table and writes CSV, JSON and plots.",
        epilog="Example: keras-sparse-init compare --gin_bindings \"ACTIVATION='tanh'\" --output_dir runs/compare",
    )
    _add_config_arguments(
        compare,
        _COMPARE_CONFIG,
        names="INITIALIZERS, SIZES, ACTIVATION, SAMPLES, EPOCHS, LEARNING_RATE, SPARSITY, SEED",
        example="compare.negative_slope=0.1",
        directory="a new or empty directory",
    )
    compare.set_defaults(command=_compare)

    sweep = commands.add_parser(
        "sweep",
        help="train every combination of values and seeds",
        description="Trains every combination of values and seeds, each in a process and a directory of its own. "
        "Finished runs are left alone and stopped ones go on, so the same command completes a sweep.",
        epilog='Example: keras-sparse-init sweep --gin_file mlp/scratch.gin --grid "SPARSITY=[0.9, 0.98]" --grid '
        "\"INIT=['unit', 'dense']\" --seeds 0 1 2 --jobs 2 --output_dir runs/sweep",
    )
    sweep.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=[VALUE, ...]",
        help="values for what a binding may name, as Python literals; may be repeated",
    )
    sweep.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="values of SEED")
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="how many run at a time (default: 1)")
    sweep.add_argument(
        "--print_commands",
        action="store_true",
        help="print a command for each run that is not finished, for a cluster's scheduler, and run nothing",
    )
    _add_config_arguments(
        sweep,
        _TRAIN_CONFIG,
        names="as of the command train",
        example="train.log_every=50",
        directory="a new or empty directory, or that of this sweep, which then goes on",
        required=True,
    )
    sweep.set_defaults(command=_sweep)

    report = commands.add_parser(
        "report",
        help="compare finished runs",
        description="Prints tables of finished runs side by side: those that differ only in the seed are one row, with "
        "the mean and its standard error.",
    )
    report.add_argument("directories", nargs="+", metavar="DIR", help="a run's directory, or one that holds runs")
    report.add_argument(
        "--output_dir",
        metavar="DIR",
        help="where to write report.csv, curves.csv, curves.png and accuracy.png, none of which may be there "
        "(default: nothing is written)",
    )
    report.set_defaults(command=_report)

    hessian = commands.add_parser(
        "hessian",
        help="spectrum of the Hessian of a run's loss",
        description="Finds the eigenvalues of the Hessian of the training loss at checkpoints of a finished run, over "
        "the weights that are not masked; prints a table and writes CSV, JSON and a plot.",
        epilog="Example: keras-sparse-init hessian runs/mine --checkpoints start end --output_dir runs/hessian",
    )
    hessian.add_argument("directory", metavar="RUN", help="the directory of a finished run")
    hessian.add_argument(
        "--checkpoints",
        nargs="+",
        type=_checkpoint,
        default=["start", "end"],
        metavar="CHECKPOINT",
        help='"start", "end", or a step of which the run has a checkpoint (default: start end)',
    )
    hessian.add_argument(
        "--method",
        choices=("auto", "exact", "lanczos"),
        default="auto",
        help="all eigenvalues, or Lanczos's method; auto: exact for up to 3,000 weights",
    )
    hessian.add_argument("--images", type=int, default=512, help="training images of the loss (default: 512)")
    hessian.add_argument("--probes", type=int, default=4, help="random vectors of lanczos (default: 4)")
    hessian.add_argument("--iterations", type=int, default=90, help="products for each of them (default: 90)")
    _add_analysis_arguments(hessian)
    hessian.set_defaults(command=_hessian)

    interpolate = commands.add_parser(
        "interpolate",
        help="loss and accuracy between the networks of two runs",
        description="Evaluates the networks on the straight line between those of two finished runs, and on a "
        "quadratic Bezier curve that is trained to have a small loss; prints a table and writes CSV, JSON and a plot.",
        epilog="Example: keras-sparse-init interpolate runs/scratch runs/lottery --output_dir runs/between",
    )
    interpolate.add_argument("first", metavar="RUN", help="the directory of a finished run")
    interpolate.add_argument("second", metavar="OTHER", help="that of another run of the same network, or the same")
    interpolate.add_argument(
        "--checkpoints",
        nargs=2,
        type=_checkpoint,
        default=["end", "end"],
        metavar="CHECKPOINT",
        help='of the first and the second run: "start", "end", or a step (default: end end)',
    )
    interpolate.add_argument(
        "--mask",
        choices=("none", "first", "second"),
        default="none",
        help="whose mask all networks get (default: none: weights are 0 where both are)",
    )
    interpolate.add_argument("--points", type=int, default=29, help="networks on each path (default: 29)")
    interpolate.add_argument("--lower", type=float, default=-0.2, help="where the line begins (default: -0.2)")
    interpolate.add_argument("--upper", type=float, default=1.2, help="where the line ends (default: 1.2)")
    interpolate.add_argument(
        "--curve_steps", type=int, default=500, help="training steps of the curve; 0: no curve (default: 500)"
    )
    interpolate.add_argument("--learning_rate", type=float, default=0.01, help="of the curve (default: 0.01)")
    _add_analysis_arguments(interpolate)
    interpolate.set_defaults(command=_interpolate)
    return parser


def _checkpoint(text: str) -> str | int:
    if text not in ("start", "end") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f'must be "start", "end" or a step, not {text!r}')
    return int(text) if text.isdecimal() else text


def _add_analysis_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what every command that looks at finished runs takes."""
    parser.add_argument("--seed", type=int, default=0, help="determines what is drawn (default: 0)")
    parser.add_argument("--data", help="the run's data, where they are not found by the name that the run knew")
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        help="where to write the results: a new or empty directory (default: a new directory under runs/)",
    )


def _add_config_arguments(
    parser: argparse.ArgumentParser, default: str, *, names: str, example: str, directory: str, required: bool = False
) -> None:
    """Adds what every command with a config takes: files, bindings, imports, and where to write.

    Args:
        parser: The command's parser.
        default: The config that is taken when none is given.
        names: What stands at the head of the configs.
        example: A binding of something else.
        directory: What the output directory may be.
        required: Whether it must be given.
    """
    parser.add_argument(
        "--gin_file",
        action="append",
        metavar="FILE",
        help=f"a config, looked for in the working directory, then among the packaged ones; may be repeated, "
        f"later ones override (default: {default})",
    )
    parser.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"overrides a value of the config: {names}, or any parameter, such as {example}; may be repeated",
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="a Python module, looked for in the working directory too, whose functions and classes bindings may name "
        "as @NAME; may be repeated",
    )
    parser.add_argument(
        "--output_dir",
        metavar="DIR",
        required=required,
        help=f"where to write the results: {directory}"
        + ("" if required else " (default: a new directory under runs/)"),
    )
    parser.set_defaults(default_config=default)


def _read_arguments(arguments: argparse.Namespace, check: str) -> tuple[list[Path], list[str], list[str]]:
    """What the makers in gin_registry take, after refusing what can be refused without TensorFlow, and importing it.

    Args:
        arguments: Those of a parser with `_add_config_arguments`.
        check: The function of `run_dir` that refuses an output directory.
    """
    from keras_sparse_init.training import run_dir
    from keras_sparse_init.training.configs import find_config

    files = [find_config(name) for name in arguments.gin_file or [arguments.default_config]]
    if arguments.output_dir is not None:
        getattr(run_dir, check)(arguments.output_dir)
    _import_tensorflow_quietly()
    return files, arguments.gin_bindings, arguments.imports


def _train(arguments: argparse.Namespace) -> int:
    try:
        config_arguments = _read_arguments(arguments, "check_output_dir")
        from keras_sparse_init.training.gin_registry import make_job

        job, config = make_job(*config_arguments)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: several workers, too late or refused.
        return _fail(error, code=2)
    if job.is_chief:
        print(job, flush=True)
    try:
        result = job.run(arguments.output_dir, config=config)
    except KeyboardInterrupt:
        told = "" if job.directory is None else f"; to go on, give this command with --output_dir {job.directory}"
        return _fail(f"interrupted{told}", code=130)
    except FloatingPointError as error:
        return _fail(error, code=1)
    except (OSError, ValueError, RuntimeError) as error:  # A directory that may not be made, a full disk, ...
        return _fail(error, code=2)
    if job.is_chief:
        print(f"\n{result.table}\n\ntest accuracy {result.summary['test_accuracy']:.2%}\nresults in {result.directory}")
    return 0


def _signal(arguments: argparse.Namespace) -> int:
    try:
        config_arguments = _read_arguments(arguments, "check_new_dir")
        from keras_sparse_init.training import run_dir
        from keras_sparse_init.training.gin_registry import make_signal

        grid, config = make_signal(*config_arguments)
        output_dir = arguments.output_dir or run_dir.default_output_dir("signal", f"seed{grid.seed}")
        directory = run_dir.make_new_dir(output_dir)
        print(grid, flush=True)
        result = grid.run()
        print(f"\n{result}", flush=True)
        lacking = result.write(directory, config)
    except (ValueError, OSError) as error:
        return _fail(error, code=2)
    print(f"\nresults in {directory}" if lacking is None else f"\nresults in {directory}, without plots: {lacking}")
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    try:
        config_arguments = _read_arguments(arguments, "check_new_dir")
        from keras_sparse_init.training import run_dir
        from keras_sparse_init.training.comparison_files import write_comparison
        from keras_sparse_init.training.gin_registry import make_comparison

        comparison, config = make_comparison(*config_arguments)
        print(comparison, flush=True)
        settings = comparison.settings
        parts = ("compare", settings["activation"], f"seed{settings['seed']}")
        directory = run_dir.make_new_dir(arguments.output_dir or run_dir.default_output_dir(*parts))
        lacking = write_comparison(comparison, directory, config)
    except (ValueError, OSError) as error:
        return _fail(error, code=2)
    print(f"\nresults in {directory}" if lacking is None else f"\nresults in {directory}, without plots: {lacking}")
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    from keras_sparse_init.training.configs import find_config
    from keras_sparse_init.training.sweep import Sweep

    try:
        files = arguments.gin_file or [arguments.default_config]
        for name in files:
            find_config(name)
        sweep = Sweep(
            arguments.output_dir, arguments.grid, arguments.seeds, files, arguments.gin_bindings, arguments.imports
        )
        if arguments.print_commands:
            print("\n".join(run.command for run in sweep.runs if not run.is_finished))
            return 0
        failed = sweep.run(arguments.jobs)
    except (ValueError, OSError) as error:
        return _fail(error, code=2)
    except KeyboardInterrupt:
        return _fail("interrupted; to go on, give this command again", code=130)
    if failed:
        return _fail(f"{len(failed)} of {len(sweep.runs)} runs failed; their logs say why: {failed[0].log}", code=1)
    print(f"\nresults in {sweep.output_dir}; compare them: keras-sparse-init report {sweep.output_dir}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from keras_sparse_init.training.report import report

    try:
        print(report(arguments.directories, arguments.output_dir))
    except (ValueError, OSError, ImportError) as error:
        return _fail(error, code=2)
    return 0


def _hessian(arguments: argparse.Namespace) -> int:
    def compute() -> Any:
        from keras_sparse_init.training import hessian

        names = ("checkpoints", "method", "images", "probes", "iterations", "seed", "data")
        return hessian(arguments.directory, **{name: getattr(arguments, name) for name in names})

    return _analyse(arguments, "hessian", compute)


def _interpolate(arguments: argparse.Namespace) -> int:
    def compute() -> Any:
        from keras_sparse_init.training import interpolate

        names = ("checkpoints", "mask", "points", "lower", "upper", "curve_steps", "learning_rate", "seed", "data")
        return interpolate(arguments.first, arguments.second, **{name: getattr(arguments, name) for name in names})

    return _analyse(arguments, "interpolate", compute)


def _analyse(arguments: argparse.Namespace, command: str, compute: Callable[[], Any]) -> int:
    """Computes something of finished runs, prints it and writes it."""
    from keras_sparse_init.training import run_dir

    try:
        directory = run_dir.check_new_dir(arguments.output_dir or run_dir.default_output_dir(command))
        _import_tensorflow_quietly()
        result = compute()
        print(result, flush=True)
        lacking = result.write(directory)
    except (ValueError, OSError) as error:
        return _fail(error, code=2)
    except FloatingPointError as error:
        return _fail(error, code=1)
    print(f"\nresults in {directory}" if lacking is None else f"\nresults in {directory}, without plots: {lacking}")
    return 0


def _import_tensorflow_quietly() -> None:
    """Keeps TensorFlow's C++ log (CPU features, missing GPUs) off the terminal, unless the user has set its level."""
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3") != "3":
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    # TensorFlow 2.21 logs while its libraries are loaded, before it reads its level: only the descriptor stops that.
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), 2)
        import tensorflow  # noqa: F401
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _fail(error: object, code: int) -> int:
    print(f"keras-sparse-init: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
