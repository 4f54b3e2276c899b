"""Make one file of a checkpoint's shards: `daruma export URI --format safetensors|torch -o FILE`.

The state dict has one tensor a table, named and shaped as the worker's parameters were.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from daruma_trainer.checkpoint.loading import load
from daruma_trainer.contract import ExitCode
from daruma_trainer.errors import ConfigurationError, MissingError, StoreError
from daruma_trainer.layout import Floats

Arrays = Mapping[str, Floats]


def write_safetensors(arrays: Arrays, path: Path) -> None:
    """Write a safetensors file. MissingError: its library is not installed."""
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file
    except ImportError as error:
        raise _missing("safetensors") from error
    try:
        save_file(dict(arrays), path)
    except SafetensorError as error:
        raise StoreError(f"cannot write {path}: {error}") from error


def write_torch(arrays: Arrays, path: Path) -> None:
    """Write a state dict for `torch.load(..., weights_only=True)`."""
    try:
        import torch
    except ImportError as error:
        raise _missing("torch") from error
    # Opened here, so that a full disk is an OSError and not one of torch's.
    with path.open("wb") as file:
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, file)


FORMATS: Mapping[str, Callable[[Arrays, Path], None]] = {
    "safetensors": write_safetensors,
    "torch": write_torch,
}


def export(uri: str, form: str, out: Path) -> list[str]:
    """Write the file, whole or not at all; returns the names of the tensors in it."""
    arrays = load(uri)
    new = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        FORMATS[form](arrays, new)
        new.replace(out)
    except OSError as error:
        raise StoreError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        new.unlink(missing_ok=True)
    return sorted(arrays)


def main(arguments: Sequence[str]) -> int:
    """Export; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="daruma export", description="Make one file of a job's result."
    )
    parser.add_argument("uri", metavar="URI", help="status.result.uri of the job")
    parser.add_argument("--format", choices=sorted(FORMATS), default="safetensors")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        names = export(options.uri, options.format, options.out)
    except ConfigurationError as error:
        return _fail(error, ExitCode.USAGE)
    except MissingError as error:
        return _fail(error, ExitCode.MISSING)
    except StoreError as error:
        return _fail(error, ExitCode.FAILED)
    sys.stdout.write(f"{options.out}: {', '.join(names)}\n")
    return ExitCode.OK


def _missing(library: str) -> MissingError:
    return MissingError(
        f"this format needs {library}: pip install 'daruma-operator[torch]', "
        "or choose another --format"
    )


def _fail(error: Exception, code: ExitCode) -> int:
    sys.stderr.write(f"daruma export: {error}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
