"""`fusedres` and `python -m fusedres`: the command line; without its library `doctor` and `--version` alone."""

from __future__ import annotations

import sys

from fusedres.cli import doctor

LIBRARY = "typer"


def without_library(arguments: list[str]) -> int | str:
    """The exit code of `doctor` and `--version`, or what to install for any other command."""
    if arguments == ["--version"]:
        print(f"fusedres {doctor.package_version('fusedres')}")
        return 0
    if arguments[:1] == ["doctor"] and set(arguments[1:]) <= {"--json"}:
        return doctor.run(as_json="--json" in arguments)
    return (
        f"fusedres: the command line needs {LIBRARY}, which is not installed: pip install 'fusedres[cli]' "
        "(`fusedres doctor [--json]` works without it)"
    )


def main() -> None:
    try:
        from fusedres.cli.app import app
    except ModuleNotFoundError as error:
        if error.name != LIBRARY:
            raise
        sys.exit(without_library(sys.argv[1:]))
    app(prog_name="fusedres")


if __name__ == "__main__":
    main()
