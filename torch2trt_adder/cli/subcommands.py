"""Each subcommand is one call into another file."""

import argparse
from typing import Any

# ---- subcommands: each imports what it needs once the arguments are known to be right


def run_export(o: argparse.Namespace) -> dict[str, Any]:
    from . import commands

    dynamic = dict(o.dynamic)
    return commands.export(o.model, o.file, o.shape, dynamic, o.checkpoint, o.half, o.opset, not o.no_check, o.trust)


def run_build(o: argparse.Namespace) -> dict[str, Any]:
    from . import commands

    ranges = dict(o.range)
    return commands.build(
        o.file, o.plan, ranges, o.fp16, o.workspace, o.timing_cache, o.embed_plugin, o.verbose, o.fuse
    )


def run_convert(o: argparse.Namespace) -> dict[str, Any]:
    from . import commands

    dynamic = dict(o.dynamic)
    options = o.checkpoint, o.half, o.fp16, o.route, o.trust, o.fuse
    return commands.convert(o.model, o.plan, o.shape, dynamic, *options)


def run_check(o: argparse.Namespace) -> dict[str, Any]:
    from . import commands

    fp16 = o.fp16 or o.half
    return commands.check(o.model, o.plan, o.shape, o.samples, o.rtol, o.checkpoint, o.half, fp16, o.host_code, o.trust)


def run_bench(o: argparse.Namespace) -> dict[str, Any]:
    from . import commands

    return commands.bench(o.plan, o.shape, o.runs, o.cuda_graph, o.host_code)


def run_inspect(o: argparse.Namespace) -> dict[str, Any]:
    from . import commands

    return commands.inspect(o.plan, o.shape, o.host_code)


def run_triton(o: argparse.Namespace) -> dict[str, Any]:
    from . import triton_server

    return triton_server.write_repository(o.folder, o.plan, o.plan.stem if o.name is None else o.name, o.embedded)


def run_demo(o: argparse.Namespace) -> dict[str, Any]:
    from . import demo

    return demo.run(o.epochs, o.checkpoint, o.seed)


def run_info(o: argparse.Namespace) -> dict[str, Any]:
    from . import info

    return info.show()
