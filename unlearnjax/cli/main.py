"""`unlearnjax`: parse, call the library, print. Bad input ends in one line on stderr and exit status 2."""

import argparse
import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from unlearnjax.cli import bench, commands, merge, plan, trace
from unlearnjax.cli.huge_pages import restart_with_huge_pages
from unlearnjax.distributed.processes import APART, follows, join, launcher, leave, own_folder, several
from unlearnjax.errors import UserError, nearest
from unlearnjax.training.interrupt import Stop, catch_signals


class _Parser(argparse.ArgumentParser):
    """One line for a wrong command line, as for every other error."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Called for each command with what follows it: what it does not know is refused here, by its own name."""
        found, unknown = super().parse_known_args(args, namespace)
        for argument in unknown:
            hint = nearest(argument, self._option_string_actions) if argument.startswith("-") else ""
            self.error(f"unknown {'option' if hint else 'argument'} {argument!r}{hint}")
        return found, unknown


SHARED = ("run", "demo", "evaluate", "trace")  # commands that several processes run as one job
TOLD = ("environment", "srun", "mpirun", "Kubernetes")  # launchers that start several processes, for certain
LOST = 75  # exit status; EX_TEMPFAIL of sysexits.h


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = "Machine unlearning: train many candidates at once, merge them into one."
    top = _Parser(prog="unlearnjax", description=text, allow_abbrev=False)
    top.add_argument("--version", action="store_true", help="print the version and exit")
    sub = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        p = sub.add_parser(name, help=text, description=text, allow_abbrev=False)
        p.set_defaults(run=run)
        p.add_argument("--quiet", action="store_true", help="no progress bars")
        return p

    def data(p: argparse.ArgumentParser, images: bool = False) -> None:
        rows = "JSONL, JSON, parquet or a hub data set with the columns input, output and, if you like, id and task"
        or_images = "; of an image model class:NAME, fraction:F or ids:FILE of --data, or a data set" if images else ""
        p.add_argument("--forget", required=True, metavar="F", help=f"rows to forget: {rows}{or_images}")
        p.add_argument("--retain", required=not images, metavar="R", help="rows to keep, likewise")
        p.add_argument(
            "--members", metavar="M", help="documents the model was trained on and is to forget (membership)"
        )
        p.add_argument("--nonmembers", metavar="X", help="like documents the model never saw")
        p.add_argument("--probe", metavar="P", help="general-knowledge questions (columns input, output)")
        text = "of the base weights: float32 (default on CPUs), bfloat16 (default elsewhere) or float16"
        p.add_argument("--dtype", metavar="D", help=text)

    def mesh(p: argparse.ArgumentParser) -> None:
        p.add_argument(
            "--mesh", metavar="AXES",
            help="how devices share the work: candidate=4,data=1,fsdp=2,tensor=1; axes left out have one device "
            "(default: of GPUs and TPUs by their number and memory; a CPU is one device)",
        )  # fmt: skip

    def mmlu(p: argparse.ArgumentParser) -> None:
        text = "measure MMLU: a folder of the hub's layout, or cais/mmlu itself"
        p.add_argument("--mmlu-data", metavar="M", help=text)
        p.add_argument("--mmlu-shots", type=int, default=5, help="solved questions before each (default: 5)")

    def going_on(p: argparse.ArgumentParser, work: str = "run") -> None:
        text = f"go on with the unfinished {work} in --out, if there is one"
        p.add_argument("--resume", action="store_true", help=text)

    def checkpoints(p: argparse.ArgumentParser) -> None:
        going_on(p)
        p.add_argument(
            "--checkpoint-every", type=float, default=120.0, metavar="SECONDS",
            help="of training, after which it is saved so that --resume goes on from there (default: 120)",
        )  # fmt: skip

    def suite(p: argparse.ArgumentParser, default: str = "the recipe's") -> None:
        p.add_argument(
            "--evaluate", choices=("official", "full"), help=f"full: also what the score hides (default: {default})"
        )

    p = add("run", commands.run, "Unlearn: train candidates, merge, evaluate, export.")
    p.add_argument("--model", required=True, help="a language model, image classifier or CLIP model: folder or hub id")
    data(p, images=True)
    mmlu(p)
    group = p.add_argument_group("image models")
    text = "parquet or a hub data set of images and labels: what a classifier was trained on, or what CLIP is to keep"
    group.add_argument("--data", metavar="D", help=text)
    group.add_argument("--test", metavar="T", help="images for the scores at the end")
    group.add_argument("--forget-test", metavar="T", help="the same for a --forget that is a data set with own classes")
    text = "images to choose lambda by (default: half of --test; for CLIP rows held out of --data)"
    group.add_argument("--validation", metavar="V", help=text)
    group.add_argument("--resize", action="store_true", help="bring images to the size and mode that the model takes")
    p.add_argument("--out", required=True, help="a new or empty folder for everything that is made")
    p.add_argument("--recipe", default="default", help="a recipe's name, or a YAML file (default: default)")
    p.add_argument("--gold", metavar="G", help="a model that never saw the forget rows, to compare with")
    suite(p)
    checkpoints(p)
    mesh(p)

    p = add("demo", commands.demo, "The same job on a small model and a corpus made on the spot; nothing to download.")
    p.add_argument("--out", default="demo-out", help="a new or empty folder (default: demo-out)")
    p.add_argument("--recipe", default="demo", help="a recipe's name, or a YAML file (default: demo)")
    suite(p)
    p.add_argument("--seed", type=int, default=0, help="of the corpus and the model (default: 0)")
    checkpoints(p)
    mesh(p)

    p = add("evaluate", commands.evaluate, "Score a model folder by the official SemEval-2025 Task 4 protocol.")
    p.add_argument("--model", required=True, help="a model folder or hub id")
    data(p)
    p.add_argument("--adapter", metavar="FOLDER", help="a PEFT adapter to put on the model")
    p.add_argument("--mmlu", metavar="FILE", help="a metrics.json with average_acc, as the official script reads it")
    mmlu(p)
    p.add_argument("--out", required=True, help="a new or empty folder for generations and scores.json")
    suite(p, "official")
    p.add_argument("--original", metavar="O", help="the model before unlearning, for --evaluate full without --adapter")
    p.add_argument("--gold", metavar="G", help="a model that never saw the forget rows, for --evaluate full")
    p.add_argument("--max-new-tokens", type=int, default=256, help="default: 256, the official value")
    p.add_argument("--batch-size", type=int, default=32, help="rows at once, at most (default: 32)")
    going_on(p, "evaluation")
    mesh(p)

    p = add("score", commands.score, "The official scores of a folder of generation CSVs with the official columns.")
    p.add_argument("folder", help="holds forget_*.csv and retain_*.csv, and mia_results/ if membership is to be scored")
    p.add_argument("--mmlu", metavar="FILE", help="a metrics.json with average_acc")

    p = add("merge", merge.merge, "Merge model folders, tensor by tensor.")
    merge.add_options(p)

    p = add("trace", trace.trace, "Find the layers that hold a model's facts, by causal mediation.")
    trace.add_options(p)
    going_on(p, "trace")
    mesh(p)

    p = add("plan", plan.plan, "What a job takes on a machine that need not be there: memory, operations, collectives.")
    plan.add_options(p)
    mesh(p)

    p = add("bench", bench.bench, "Throughput on this machine: of merges, and of candidate training.")
    bench.add_options(p)

    p = add("methods", commands.methods, "The merge methods: their definitions, spaces and parameters.")
    p.add_argument("name", nargs="?", metavar="NAME", help="one method, in full")
    return top


def _share(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    """Join the job's other processes, where there are any. The first one writes and speaks; the others write to a place
    of their own and speak of errors alone."""
    join()
    arguments.out = str(stack.enter_context(own_folder(arguments.out)))
    if follows():
        arguments.quiet = True
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status: 0, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM, 141 where
    nobody reads its output any more, 75 where the job's other processes are lost, 1 where memory did not suffice.

    Either signal stops training and evaluation in order: with what was done saved. A second one ends the process at
    once.
    """
    try:
        status = _main(argv)
    except Exception as error:
        if _out_of_memory(error):
            status = 1
        elif several():
            status = _alone(error)
        else:
            raise
    if several():
        leave(status)
    return status


def _out_of_memory(error: Exception) -> bool:
    """Whether it is that devices have too little memory; then it is told."""
    from jax.errors import JaxRuntimeError

    if not isinstance(error, JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
        return False
    reason = " ".join(str(error).split())[:300]
    print(
        "unlearnjax: error: a device's memory does not suffice; what was saved is kept, and smaller parts may do: "
        "a recipe's training: {remat: full, tokens_at_once: 1} (also with --resume), candidates_at_once, smaller "
        f"batches, --dtype bfloat16, or a --mesh with more devices along fsdp or tensor ({reason})",
        file=sys.stderr,
    )
    return True


def _alone(error: Exception) -> int:
    """Tell what went wrong in this process of several."""
    from jax.errors import JaxRuntimeError

    if not isinstance(error, JaxRuntimeError):
        traceback.print_exception(error)
        return 1
    reason = " ".join(str(error).split())[:300]
    print(
        "unlearnjax: error: a program that all processes of this job run together failed here, most likely because "
        f"another one has ended: see its output, and start all again with --resume ({reason})",
        file=sys.stderr,
    )
    return LOST


def _main(argv: Sequence[str] | None) -> int:
    # The tokenizers warn at every fork otherwise, and transformers of long rows; a user's own setting wins.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    arguments = None
    try:
        arguments = parser().parse_args(argv)
        if arguments.version:
            import unlearnjax

            print(f"unlearnjax {unlearnjax.__version__}")
        elif arguments.command is None:
            parser().print_help()
        else:
            if argv is None and arguments.command not in ("score", "methods"):
                restart_with_huge_pages(keep_freed=arguments.command == "merge")
            arguments.command_line = ["unlearnjax", *(sys.argv[1:] if argv is None else argv)]
            arguments.stop = Stop()
            with contextlib.ExitStack() as stack:
                if arguments.command in SHARED:
                    _share(arguments, stack)
                elif arguments.command == "merge" and (by := launcher()) in TOLD:
                    raise UserError(f"merge: is a command of one process, and {by} started several; {APART}")
                stack.enter_context(catch_signals(arguments.stop, commands.say))
                arguments.run(arguments)
            sys.stdout.flush()
    except UserError as error:
        print(f"unlearnjax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return commands.interrupted(arguments, error)
    except BrokenPipeError:
        # Whoever read the output has gone (`| head`): nothing is wrong, and Python must not try to write the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0


if __name__ == "__main__":
    sys.exit(main())
