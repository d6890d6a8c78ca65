"""The command line: python -m anytime run | list | report | compare | cite | measure | board | export | zoo | clean-cache."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anytime.errors import AnytimeError, DataError, UsageError, WriteError, near

if TYPE_CHECKING:  # to import it takes longer than many commands
    import pandas as pd

FORMATS = ("md", "csv", "tex", "html")


def parser() -> argparse.ArgumentParser:
    """Arguments of every command."""
    top = argparse.ArgumentParser(
        prog="anytime", description="Anytime networks under compression: one experiment, one honest table."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("run", "run what an experiment lacks, then write and print its table"),
        ("list", "what an experiment asks for: todo, done, skip and why, fail"),
        ("report", "write tables and figures from the records, without running anything"),
        ("compare", "two experiments or runs side by side; exit code 1 if B is worse than A beyond a tolerance"),
        ("cite", "print the sources of what an experiment uses"),
        ("measure", "time what an experiment lacks on a board, and execute its policies there; trains nothing that is there"),
        ("board", "say what a board is, in which state, and what is wrong with it"),
        ("export", "write one network, ready to use: a folder for anytime.load, or a single ONNX file"),
        ("zoo", "copy the networks that an experiment has trained to results/zoo, where every run finds them"),
        ("clean-cache", "say what the cache holds, and with --yes delete it"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name in ("run", "report", "measure", "compare", "export", "zoo"):
            command.add_argument("--quiet", action="store_true", help="print nothing but errors, and JSON where it is asked for")
        if name in ("run", "list", "report", "compare", "cite", "measure"):
            command.add_argument("--json", action="store_true", help="print JSON instead of text")
        if name == "clean-cache":
            command.add_argument("--yes", action="store_true", help="delete")
            continue
        if name == "board":
            command.add_argument("what", choices=["check"], help="read-only: nothing is changed or left there")
            command.add_argument("boards", nargs="+", metavar="NAME", help="a file of experiments/boards/, or its path")
            continue
        if name == "compare":
            for side in ("a", "b"):
                command.add_argument(
                    side, metavar=side.upper(), help="an experiment with records, or a folder of results or records"
                )
            command.add_argument(
                "--tolerance",
                action="append",
                default=[],
                metavar="NAME=V",
                help="accuracy=0.3 (points), size_bytes=1.02 (a ratio), any metric of a table's CSV; may be repeated",
            )
            continue
        if name == "export":
            _export_arguments(command)
        elif name == "report":
            command.add_argument(
                "experiment", metavar="EXP", nargs="?", help="as of run; without it every experiment that has records"
            )
            command.add_argument(
                "--check", action="store_true", help="write nothing: are the tables there what the records give?"
            )
        else:
            command.add_argument("experiment", metavar="EXP", help="a name in experiments/, or the path of your own file")
        command.add_argument(
            "--set", action="append", default=[], metavar="a.b=v", dest="sets", help="override a field; may be repeated"
        )
        if name == "measure":
            command.add_argument(
                "--board", required=True, nargs="+", metavar="NAME", dest="boards", help="of experiments/boards/; several at once"
            )
        if name in ("run", "report", "measure"):
            command.add_argument(
                "--format", default="md,csv,tex", metavar="F", help=f"of {', '.join(FORMATS)}; several with commas"
            )
        if name == "zoo":
            command.add_argument(
                "--only",
                action="append",
                nargs="+",
                default=[],
                metavar="WORD",
                dest="networks",
                help="one network, by words of its row or by the key of its uncompressed row, without its twin; may be repeated",
            )
        if name == "run":
            command.add_argument("--force", action="store_true", help="run finished work again")
            command.add_argument(
                "--only",
                nargs="+",
                default=[],
                metavar="WORD",
                help="networks whose rows have these words, and what they are compared with",
            )
            command.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that train and predict side by side")
    return top


def _export_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "cell",
        metavar="CELL",
        nargs="+",
        help="the beginning of its key (column cell of a table's CSV), or EXP and words of its row",
    )
    command.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write, or file with --single-file")
    command.add_argument(
        "--policy",
        metavar="NAME",
        help="one of the experiment's; default: every exit is written, for a policy that load is given; without one it answers "
        "at the last exit, and a folder's other heads run for nothing",
    )
    command.add_argument("--budget", type=float, metavar="B", help="the policy's, one of the experiment's")
    command.add_argument("--single-file", action="store_true", help="one ONNX with the policy inside, for plain onnxruntime")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; answer its exit code: 0, 1 for a failure, 2 for a wrong question, 130 when interrupted."""
    args = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without our signs gets question marks, not a traceback
    # make gives several in one: SET="recipe.epochs=1 train_seeds=(0, 1)", ONLY="SDN ResNet-20".
    args.sets = [one for said in getattr(args, "sets", []) for one in re.split(r"\s+(?=[\w.*-]+=)", said.strip())]
    for words in ("only", "cell"):
        said = getattr(args, words, [])  # the path of a user's own experiment may hold spaces
        setattr(args, words, [w for one in said for w in ([one] if os.path.isfile(os.path.expanduser(one)) else one.split())])
    try:
        code = {
            "run": _run, "list": _list, "report": _report, "compare": _compare, "cite": _cite, "measure": _measure, "board": _board,
            "export": _export, "zoo": _zoo, "clean-cache": _clean_cache,
        }[args.command](args)  # fmt: skip
        sys.stdout.flush()  # a reader that has gone is met here, not when the interpreter ends
        return code
    except AnytimeError as error:
        if args.debug:
            traceback.print_exc()
        print(f"anytime: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(
            "\nanytime: interrupted; nothing that was finished is lost, the same command goes on where this one stopped",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # what is still held back must not be tried again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(args: argparse.Namespace) -> int:
    from anytime.cells import only
    from anytime.find import experiment
    from anytime.progress import Bars
    from anytime.run import Runner

    formats = _formats(args.format)
    if args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs}: give 1 or more")
    exp = experiment(args.experiment, args.sets)
    with Bars(args.quiet) as bars:
        meant = only(exp, args.only) if args.only else frozenset()
        runner = Runner(exp, args.results, bars.step, bars.log, args.debug, meant)
        if args.force:
            runner.forget()
        n, unreadable = len(runner.todo()), None
        bars.log(f"{exp.name}: {n} facts to do" if n else f"{exp.name}: everything is there; FORCE=1 (--force) runs it again")
        try:
            runner.run(args.jobs)
        except DataError as error:
            unreadable = error  # of some suites: what the others gave has its table
        runner.remade()
        if "html" in formats:
            from anytime.page.pictures import keep

            for path in keep(exp, args.results):
                bars.log(f"wrote {path}")
    if runner.known or unreadable is None:
        _write_reports([exp.name], formats, args)
    if unreadable is not None:
        raise unreadable
    failed = [reason for fact_state, reason in runner.states() if fact_state == "fail"]
    if failed:
        print(f"anytime: {len(failed)} facts failed, the first one because: {failed[0]}", file=sys.stderr)
    return 1 if failed else 0


def _write_reports(names: Sequence[str], formats: Sequence[str], args: argparse.Namespace) -> None:
    """Write the reports of ``names``; print the only one, or as JSON all."""
    from anytime import report
    from anytime.progress import Bars

    said: list[dict[str, Any]] = []
    with Bars(args.quiet) as bars:
        for i, name in enumerate(names):
            bars.step("report", i, len(names))
            written = report.write(args.results / "records", name, args.results, formats)
            if args.json or not args.quiet:
                said.append({"rows": report.rows(args.results / "records", name), "wrote": [str(path) for path in written]})
    if args.json:
        print(json.dumps([_plain(**one) for one in said] if len(said) > 1 else _plain(**said[0]), indent=1))
        return
    for one in said:
        lines = [f"wrote {path}" for path in one["wrote"]]
        print(*([report.show(one["rows"])] if len(said) == 1 else []), *lines, sep="\n")


def _plain(rows: pd.DataFrame, wrote: list[str]) -> dict[str, Any]:
    """A report as JSON says it: nothing where there is no number."""
    return {
        **{str(k): v for k, v in rows.attrs.items()},
        "wrote": wrote,
        "rows": json.loads(rows.to_json(orient="records", double_precision=15)),
    }


def _report(args: argparse.Namespace) -> int:
    from anytime import record

    name = args.experiment
    if name and (args.sets or name.endswith(".py") or "/" in name):
        from anytime.find import experiment  # what was overridden decides the name

        name = experiment(name, args.sets).name
    names = [name] if name else record.experiments(args.results / "records")
    if not names:
        raise UsageError(f"there are no records in {args.results / 'records'}: run an experiment first, or say --results")
    if not args.check:
        _write_reports(names, _formats(args.format), args)
        return 0
    wrong = list(_differences(names, args))
    if not name:  # a table without records is as wrong as one that differs
        known = {str(path) for path in (args.results / "tables").glob("*") if path.stem not in names}
        wrong += [f"{path} has no records: remove it" for path in sorted(known)]
    if args.json:
        print(json.dumps({"experiments": names, "wrong": wrong}, indent=1))
    elif not args.quiet and not wrong:
        print(f"experiments: {len(names)}; every table is what its records give, byte by byte; every figure can be drawn")
    for sentence in wrong:
        print(f"anytime: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


def _differences(names: Sequence[str], args: argparse.Namespace) -> Iterator[str]:
    """A sentence per table that is not what the records give; several experiments side by side, on the cores that there are."""
    from anytime.progress import Bars
    from anytime.report import differences
    from anytime.workers import workers

    n = min(len(names), len(os.sched_getaffinity(0)))
    with Bars(args.quiet) as bars, workers(n) if n > 1 else nullcontext() as pool:
        each = (pool.map if pool else map)(differences, names, [args.results] * len(names))
        for i, sentences in enumerate(each):
            bars.step("check", i, len(names))
            yield from sentences


def _compare(args: argparse.Namespace) -> int:
    from anytime import compare

    allowed = compare.tolerances(args.tolerance)
    said = compare.compare(args.a, args.b, args.results, allowed)
    if args.json:
        print(compare.as_json(said, allowed))
    elif not args.quiet:
        print(compare.as_markdown(said, allowed))
    return 1 if said.count("worse") or said.lost else 0


def _formats(text: str) -> tuple[str, ...]:
    wanted = tuple(f.strip() for f in text.split(",") if f.strip())
    for f in wanted:
        if f not in FORMATS:
            raise UsageError(f"--format {f}: there is no such format; {near(f, FORMATS)}")
    return wanted


def _list(args: argparse.Namespace) -> int:
    from anytime.find import experiment
    from anytime.listing import listing

    said = listing(experiment(args.experiment, args.sets), args.results)
    print(json.dumps(vars(said), indent=1) if args.json else said.text())
    return 0


def _cite(args: argparse.Namespace) -> int:
    from anytime.find import experiment
    from anytime.listing import sources

    found = sources(experiment(args.experiment, args.sets))
    width = max(map(len, found), default=0)
    print(json.dumps(found, indent=1) if args.json else "\n".join(f"{name:<{width}}  {text}" for name, text in found.items()))
    return 0


def _measure(args: argparse.Namespace) -> int:
    from anytime.find import experiment
    from anytime.measure import measure
    from anytime.progress import Bars

    formats, exp = _formats(args.format), experiment(args.experiment, args.sets)
    with Bars(args.quiet) as bars:
        left = measure(exp, args.boards, args.results, bars.log, args.debug, bars.step, args.quiet)
    _write_reports([exp.name], formats, args)
    for board, state, reason in left[:1]:
        print(f"anytime: {len(left)} facts are missing, the first one on {board}: {state} {reason}", file=sys.stderr)
    return 1 if left else 0


def _board(args: argparse.Namespace) -> int:
    from anytime.measure import check

    text, fine = check(args.boards)
    print(text)
    return 0 if fine else 1


def _export(args: argparse.Namespace) -> int:
    from anytime.export import check_free, choose, how_to_use, write_bundle, write_single
    from anytime.progress import Bars

    check_free(args.to, args.single_file)  # before anything is trained for it
    with Bars(args.quiet) as bars:
        chosen = choose(args.cell, args.sets, args.results, args.policy, args.budget, bars.step)
        path = (write_single if args.single_file else write_bundle)(chosen, args.to)
    cell, said = chosen.cell, chosen.said
    what = f"{cell.model.label} on {cell.data.label}, {cell.backend.column}, of {chosen.exp.name}"
    under = f", {said['label']} at {said['budget']:g}" if said else ""
    if not args.quiet:
        print(f"wrote {path}: {what}{under}", how_to_use(chosen, args.to, args.single_file), sep="\n\n")
    return 0


def _zoo(args: argparse.Namespace) -> int:
    import shlex
    from dataclasses import replace

    from anytime.cells import find_cell
    from anytime.find import experiment
    from anytime.zoo import add

    exp = experiment(args.experiment, args.sets)
    floats = replace(exp, backends=(exp.reference_backend,))  # one cell a training
    only = [find_cell(" ".join(words).split(), exp=floats)[1] for words in args.networks]
    command = shlex.join(["make", "exp", f"EXP={args.experiment}", *([f"SET={' '.join(args.sets)}"] if args.sets else [])])
    for path in add(exp, args.results, only, command):
        if not args.quiet:
            print(f"{path.stat().st_size / 1e6:6.2f} MB  {path}")
    return 0


def _clean_cache(args: argparse.Namespace) -> int:
    import shutil

    cache = args.results / "cache"
    if not cache.is_dir():
        print(f"{cache} is empty")
        return 0
    total = 0
    for folder in sorted(p for p in cache.iterdir() if p.is_dir()):
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        total += size
        print(f"{size / 1e6:10.1f} MB  {folder}")
    print(f"{total / 1e6:10.1f} MB  in all; records, tables and figures are not in it, but trained weights are")
    if args.yes:
        try:
            shutil.rmtree(cache)
        except OSError as error:
            raise WriteError(f"cannot delete {error.filename or cache}: {error.strerror or error}") from error
        print(f"deleted {cache}")
    else:
        print("nothing was deleted: add --yes (make clean-cache YES=1)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
