"""The command line: ``ascend-dynamo info | explain | memory | patterns``.

Exit codes: 0 all is well, 1 something was found (a pattern that fails its check, a model that does not compile),
2 wrong usage.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from ascend_dynamo.errors import AscendDynamoError, MemoryPlanError, OptionError

OK, FOUND, USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; argparse itself exits with 2 on wrong usage."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(name)s: %(message)s")
    if not sys.stderr.isatty():
        logging.getLogger("ascend_dynamo.progress").setLevel(logging.INFO)
    from ascend_dynamo.report.loading import TargetError

    try:
        return int(args.run(args))
    except (OptionError, TargetError, MemoryPlanError) as error:
        sys.stderr.write(f"ascend-dynamo {args.command}: {error}\n")
        return USAGE
    except AscendDynamoError as error:
        sys.stderr.write(f"ascend-dynamo {args.command}: {type(error).__name__}: {error}\n")
        return FOUND


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ascend-dynamo", description="Tools of the Ascend Dynamo graph compiler.")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the compiler does")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, target, CPU features, patterns, plugins")
    info.add_argument("--json", action="store_true", help="machine-readable")
    info.set_defaults(run=_info)

    explain = commands.add_parser("explain", help="compile a model once and tell what fused, what did not, and why")
    explain.add_argument("target", metavar="SCRIPT_OR_MODULE:CALLABLE", help="a callable that returns (model, args)")
    explain.add_argument("-o", "--option", action="append", default=[], metavar="NAME=VALUE", help="a backend option")
    explain.add_argument("--dump", metavar="DIR", help="write the graphs and the report of every graph there")
    explain.add_argument("--html", metavar="PATH", help="write a standalone HTML report")
    explain.add_argument("--memory-png", metavar="PATH", help="draw the memory timeline (needs matplotlib)")
    explain.add_argument("--json", action="store_true", help="print JSON instead of text")
    explain.add_argument("--no-diff", action="store_true", help="leave the graph diffs out of the text")
    explain.set_defaults(run=_explain)

    memory = commands.add_parser("memory", help="does a model fit in N GB at a batch and a length? nothing is run")
    memory.add_argument("target", metavar="SCRIPT_OR_MODULE:CALLABLE", help="a callable that returns (model, args)")
    memory.add_argument("--limit", required=True, metavar="SIZE", help="bytes, or 8GB")
    memory.add_argument("--batch", type=_positive, metavar="N", help="sequences (default: the example's)")
    memory.add_argument(
        "--chunk", type=_positive, metavar="N", help="new tokens each, 1: decode (default: the example's)"
    )
    memory.add_argument("--kv-length", type=_positive, metavar="N", help="tokens in the cache (default: the chunk)")
    memory.add_argument("--page-size", type=_positive, default=16, metavar="N", help="tokens per page (default 16)")
    memory.add_argument("-o", "--option", action="append", default=[], metavar="NAME=VALUE", help="a backend option")
    memory.add_argument("--json", action="store_true", help="machine-readable")
    memory.set_defaults(run=_memory)

    patterns = commands.add_parser("patterns", help="list, show or check patterns")
    verbs = patterns.add_subparsers(dest="verb", required=True, metavar="VERB")
    listing = verbs.add_parser("list", help="all patterns, built-in and of plugins")
    listing.add_argument("--json", action="store_true", help="machine-readable")
    listing.set_defaults(run=_patterns_list)
    show = verbs.add_parser("show", help="one pattern: its domain, its spellings, its source")
    show.add_argument("name")
    show.set_defaults(run=_patterns_show)
    check = verbs.add_parser("check", help="lint the registry and fuzz every pattern over its domain")
    check.add_argument("--budget", type=_positive, default=20, metavar="N", help="fuzz cases per pattern (default 20)")
    check.add_argument(
        "--spellings", type=_count, default=300, metavar="N", help="random spellings per grammar (default 300, 0: none)"
    )
    check.add_argument("--seed", type=int, default=0, help="the same seed draws the same cases (default 0)")
    check.add_argument("--only", action="append", metavar="NAME", help="check this pattern (may be repeated)")
    check.add_argument("--json", action="store_true", help="machine-readable")
    check.set_defaults(run=_patterns_check)
    return parser


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _info(args: argparse.Namespace) -> int:
    from ascend_dynamo.options import Options
    from ascend_dynamo.report.environment import info, lines

    data = info(Options.resolve())
    _say(json.dumps(data, indent=2) if args.json else "\n".join(lines(data)))
    return FOUND if any(p["error"] for p in data["patterns"]) else OK


def _explain(args: argparse.Namespace) -> int:
    from ascend_dynamo.options import Options
    from ascend_dynamo.report.explain import explain
    from ascend_dynamo.report.loading import load_target

    options = parse_options(args.option)
    if args.dump:
        options["dump"] = args.dump
    Options.resolve(None, options)  # refuse a wrong option before the model is built
    model, model_args, kwargs = load_target(args.target)
    found = explain(model, *model_args, options=options, **kwargs)
    if args.html:
        sys.stderr.write(f"wrote {found.html(args.html)}\n")
    if args.memory_png:
        sys.stderr.write(f"wrote {found.memory_png(args.memory_png)}\n")
    _say(found.to_json() if args.json else found.text(colour=sys.stdout.isatty(), diff=not args.no_diff))
    return OK


def _memory(args: argparse.Namespace) -> int:
    from ascend_dynamo.report.fit import check_fit, to_dict
    from ascend_dynamo.report.loading import load_target

    options = parse_options(args.option)
    model, model_args, kwargs = load_target(args.target)
    sizes = {name: getattr(args, name) for name in ("limit", "batch", "chunk", "kv_length", "page_size")}
    fit = check_fit(model, model_args, kwargs, options=options, **sizes)
    _say(json.dumps(to_dict(fit), indent=2) if args.json else str(fit))
    return OK if fit else FOUND


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """``["level=O1", "expect={'rms_norm': 4}"]`` as options; a value is a Python literal, else text.

    Raises:
        OptionError: a pair without "=".
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise OptionError(f"{pair!r} is no option: write NAME=VALUE, such as level=1")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def _patterns_list(args: argparse.Namespace) -> int:
    from ascend_dynamo.report.catalogue import describe, listing

    data = [describe(p, source) for p, source in _catalogue()]
    _say(json.dumps(data, indent=2) if args.json else "\n".join(listing(data)))
    return OK


def _patterns_show(args: argparse.Namespace) -> int:
    from ascend_dynamo.report.catalogue import show

    pattern, source = _named([args.name])[0]
    _say("\n".join(show(pattern, source)))
    return OK


def _patterns_check(args: argparse.Namespace) -> int:
    from ascend_dynamo.report.check import check, check_lines

    among = [p for p, _ in _catalogue()]
    chosen = [p for p, _ in _named(args.only)] if args.only else among
    result = check(chosen, among, budget=args.budget, seed=args.seed, spellings=args.spellings)
    _say(json.dumps(result.to_dict(), indent=2) if args.json else "\n".join(check_lines(result)))
    return FOUND if result.findings else OK


def _catalogue() -> list[tuple[Any, str]]:
    from ascend_dynamo.report.catalogue import catalogue

    return catalogue()


def _named(names: Sequence[str]) -> list[tuple[Any, str]]:
    from ascend_dynamo.option_values import nearest

    known = {p.name: (p, source) for p, source in _catalogue()}
    for name in names:
        if name not in known:
            raise OptionError(f"there is no pattern {name!r}: {nearest(name, known)}")
    return [known[name] for name in names]


if __name__ == "__main__":
    sys.exit(main())
