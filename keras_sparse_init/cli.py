"""The command `keras-sparse-init`. Reading the command line imports neither TensorFlow nor gin nor NumPy."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from keras_sparse_init._version import __version__

_DEFAULT_CONFIG = "lenet5/scratch.gin"


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
    parser = argparse.ArgumentParser(prog="keras-sparse-init", description="Trains and compares sparse networks.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser(
        "train",
        help="train a sparse network as a gin config says",
        description="Trains a sparse network as a gin config says, and writes the results to a directory.",
        epilog='Example: keras-sparse-init train --gin_file mlp/scratch.gin --gin_bindings "SPARSITY=0.9" '
        "--gin_bindings \"INIT='layer'\" --output_dir runs/mine",
    )
    train.add_argument(
        "--gin_file",
        action="append",
        metavar="FILE",
        help=f"a config, looked for in the working directory, then among the packaged ones; may be repeated, "
        f"later ones override (default: {_DEFAULT_CONFIG})",
    )
    train.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="overrides a value of the config: DATA, STEPS, BATCH, LEARNING_RATE, SEED, where a config has them also "
        "SPARSITY, METHOD, INIT, PRUNED_RUN, or any parameter, such as train.log_every=50; may be repeated",
    )
    train.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="a Python module, looked for in the working directory too, whose functions and classes bindings may name, "
        "such as train.model=@my_network; may be repeated",
    )
    train.add_argument(
        "--output_dir",
        metavar="DIR",
        help="where to write the results: a new or empty directory, or that of the same job, interrupted, which then "
        "goes on (default: a new directory under runs/)",
    )
    train.set_defaults(command=_train)

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
    return parser


def _train(arguments: argparse.Namespace) -> int:
    try:
        # What can be refused without TensorFlow is refused before it is imported.
        from keras_sparse_init.training.configs import find_config

        files = [find_config(name) for name in arguments.gin_file or [_DEFAULT_CONFIG]]
        if arguments.output_dir is not None:
            from keras_sparse_init.training.run_dir import check_output_dir

            check_output_dir(arguments.output_dir)
        _import_tensorflow_quietly()
        from keras_sparse_init.training.gin_registry import make_job

        job, config = make_job(files, arguments.gin_bindings, arguments.imports)
    except (ValueError, OSError) as error:
        return _fail(error, code=2)
    print(job, flush=True)
    try:
        result = job.run(arguments.output_dir, config=config)
    except KeyboardInterrupt:
        told = "" if job.directory is None else f"; to go on, give this command with --output_dir {job.directory}"
        return _fail(f"interrupted{told}", code=130)
    except FloatingPointError as error:
        return _fail(error, code=1)
    except (OSError, ValueError) as error:  # A directory that may not be made, a full disk, a damaged checkpoint.
        return _fail(error, code=2)
    print(f"\n{result.table}\n\ntest accuracy {result.summary['test_accuracy']:.2%}\nresults in {result.directory}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from keras_sparse_init.training.report import report

    try:
        print(report(arguments.directories, arguments.output_dir))
    except (ValueError, OSError, ImportError) as error:
        return _fail(error, code=2)
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
