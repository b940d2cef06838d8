"""Faster and quieter imports of large libraries. If one is broken: which, why, and the command that mends it."""

import contextlib
import gc
import importlib
import os
import platform
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hvd_dqn.errors import LibraryError

# TensorFlow 2.21 writes these at its import, twice and whatever TF_CPP_MIN_LOG_LEVEL says: it reads that level later.
START_UP_NOTES = (b"All log messages before absl::InitializeLog()", b"oneDNN custom operations are on")


# The versions that the project's own .venv has. An installed package knows only the ranges of its requirements.
PINS = Path(__file__).parent.parent / "launch/constraints.txt"
# What TensorFlow, Horovod and this program import. pip replaces them when it installs a package that asks for others.
IMPORTED = (
    "numpy", "tensorflow", "tensorflow-cpu", "keras", "gymnasium", "h5py", "ml-dtypes", "protobuf", "pydantic",
    "pydantic-core", "matplotlib", "rich", "pyyaml", "psutil", "cloudpickle", "tensorboard", "horovod", "mpi4py",
)  # fmt: skip
PACKAGES = ("hvd_dqn", "tensorflow", "tensorflow-cpu", "keras", "horovod", "mpi4py", "gymnasium", "numpy")
# Packages with another name than their module.
PACKAGE_OF = {"yaml": "pyyaml", "google": "protobuf", "pydantic_core": "pydantic-core", "ml_dtypes": "ml-dtypes"}


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Turns the garbage collector off while importing: it would scan objects that live until the end.

    TensorFlow then takes 1.1 s instead of 1.5, and the end of the process 0.7 s less. Raises LibraryError if a library
    that is imported here is broken.
    """
    gc.disable()
    try:
        yield
    except Exception as error:
        name = broken_library(error)
        if name is None:
            raise
        raise LibraryError(explain(name, error)) from None
    finally:
        gc.freeze()
        gc.enable()


def load_with_tensorflow(module: str) -> Any:
    """Imports TensorFlow and then a module of this package that uses it."""
    with loading():
        load_tensorflow()
        return importlib.import_module(module)


def load_tensorflow() -> None:
    """Imports TensorFlow without its start-up notes: once per rank, they hide the lines that matter.

    Raises LibraryError if it is broken.
    """
    if "tensorflow" in sys.modules:
        return
    with contextlib.ExitStack() as stack:
        # Without stderr or a temporary folder the notes are not held back. TensorFlow is imported all the same.
        with contextlib.suppress(OSError):
            stack.enter_context(_without_start_up_notes())
        try:
            importlib.import_module("tensorflow")
        except Exception as error:
            raise LibraryError(explain("tensorflow", error)) from None


@contextlib.contextmanager
def _without_start_up_notes() -> Iterator[None]:
    """If the import fails, all it wrote is dropped: tracebacks, of which NumPy writes one for each library, say less."""
    with tempfile.TemporaryFile() as written:
        stderr = os.dup(2)
        os.dup2(written.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            for line in [] if failed else written:
                if not any(note in line for note in START_UP_NOTES):
                    os.write(2, line)


def broken_library(error: BaseException) -> str | None:
    """The module of another package that could not be imported; None if `error` has another reason."""
    if isinstance(error, LibraryError):
        return None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if frame.f_code.co_name == "<module>" and name not in ("hvd_dqn", "__main__", *sys.stdlib_module_names):
            return name
    name = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    return name if name and name != "hvd_dqn" else None


def explain(name: str, error: BaseException) -> str:
    """Why the module `name` cannot be imported, in one line, and the command that mends it."""
    package = package_of(name)
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    # NumPy's reason stands behind a page of advice.
    said = next((line for line in lines if line.startswith("Original error was")), lines[0]).strip()
    changed = replaced()
    which = "".join(f" {known} {found} is installed, and {pinned} belongs here." for known, found, pinned in changed)
    installed = _version(package)
    return (
        f"{package}{f' {installed}' if installed else ''} cannot be loaded: {type(error).__name__}: {said[:300].rstrip('.')}."
        f"{which} This mends it: {cure([known for known, *_ in changed] or [package])}"
    )


def package_of(name: str) -> str:
    """The package of a module."""
    if name == "tensorflow":
        return next((package for package in ("tensorflow", "tensorflow-cpu") if _version(package)), "tensorflow-cpu")
    return PACKAGE_OF.get(name, name)


def replaced() -> list[tuple[str, str, str]]:
    """The packages of the project's own .venv that have another version than its pins: (package, version, pin)."""
    if Path(sys.prefix).resolve() != (PINS.parent.parent / ".venv").resolve():
        return []  # another environment has versions of its own
    found = ((package, _version(package), pin) for package, pin in _pins().items() if package in IMPORTED)
    return [(package, version, pin) for package, version, pin in found if version and version != pin]


def cure(packages: list[str]) -> str:
    """The command that installs the right versions of `packages`."""
    from importlib import metadata

    pip = f"{sys.executable} -m pip install"
    if PINS.exists():
        wanted = " ".join(f"{package}=={_pins()[package]}" if package in _pins() else package for package in packages)
        return f"{pip} --force-reinstall --no-deps {wanted}"
    with contextlib.suppress(metadata.PackageNotFoundError):
        asked = [text.partition(";")[0].strip() for text in metadata.requires("hvd_dqn") or []]
        packages = [next((text for text in asked if _named(text) == package), package) for package in packages]
    return f"{pip} --force-reinstall " + " ".join(f"'{package}'" for package in packages)


def versions() -> dict[str, str]:
    """Versions of Python and of installed packages, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        version = _version(package)
        if version is not None:
            found.setdefault(package.removesuffix("-cpu"), version)
    return found


def _pins() -> dict[str, str]:
    try:
        lines = PINS.read_text().splitlines()
    except OSError:
        return {}
    return dict(line.split("==", 1) for line in lines if re.fullmatch(r"[\w.-]+==[\w.]+", line))


def _named(requirement: str) -> str:
    """The package of a requirement such as "numpy<3,>=2"."""
    found = re.match(r"[\w.-]+", requirement)
    return found[0].lower() if found else ""


def _version(package: str) -> str | None:
    from importlib import metadata  # slow to import, and only needed when something is wrong

    try:
        return metadata.version(package)
    except (metadata.PackageNotFoundError, KeyError, TypeError):  # the others: of a damaged installation
        return None
