"""The build backend: setuptools', which in an environment of its own asks for torch too where it finds none.

A build reads torch's headers and links to its library, of whatever version from 2.10 on: the torch of the environment
that is installed into serves, wherever a build can see it. Under a front end that hides that environment, as uv does,
torch has to be installed for the build; otherwise the package would come without its kernels.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that stay as they are

if (
    int(setuptools.__version__.split(".")[0]) < 77
):  # without isolation no front end looks at what pyproject.toml requires
    raise RuntimeError(
        f"building fusedres needs setuptools>=77 and found {setuptools.__version__}: "
        'run `pip install "setuptools>=77"`, or leave out --no-build-isolation'
    )

sys.path.insert(0, str(Path(__file__).resolve().parent))

import native_build

Settings = dict[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *native_build.requirements()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *native_build.requirements()]
