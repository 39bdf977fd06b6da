"""What the MODEL of the command line may be. Needs no torch, so that a wrong one is refused at once."""

import pathlib


def check_source(source: str, checkpoint: pathlib.Path | None = None, half: bool = False) -> None:
    """Checks that MODEL is a function or a file, and that only a function comes with --checkpoint and --half.

    Raises:
        ValueError: it is not.
    """
    if source.endswith((".pt2", ".onnx")):
        if checkpoint is not None or half:
            raise ValueError(
                f"{source} has its parameters and types already; --checkpoint and --half are for functions."
            )
        return
    module, _, function = source.partition(":")
    if not module or not function:
        raise ValueError(
            f"{source!r} is not a model: name a function as package.module:function, or a file that ends in .pt2 or .onnx."
        )


def check_exportable(source: str) -> None:
    """Checks that MODEL is not an ONNX file.

    Raises:
        ValueError: it is one.
    """
    if source.endswith(".onnx"):
        raise ValueError(f"{source} is an ONNX file already; name a function or a .pt2 file.")
