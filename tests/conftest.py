"""Every shape and dtype annotation of mxtorq is checked while the tests run.

Real models and texts that may not travel with the project are looked for in the folder that the
environment variable MXTORQ_DATA names (default: ../shared/data beside the project); a test that
needs one skips with that reason where it is absent.

`make test` runs two files at a time (pytest-xdist), each in a process of one thread; so does
``pytest -n 2 --dist loadfile``. Every test holds beside any other: ports, disks and caches are its
own, and a busy machine breaks no bound on time.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from browser import Tab

install_import_hook("mxtorq", "beartype.beartype")

OWN_CACHE = None
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch and numba are imported; children inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    # Two processes that save a kernel of different types at the same moment can give both the same
    # file name (numba 0.68), and one would then find the other's machine code under its types.
    OWN_CACHE = tempfile.TemporaryDirectory(prefix="mxtorq-numba-")
    os.environ["NUMBA_CACHE_DIR"] = OWN_CACHE.name

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

DATA = Path(os.environ.get("MXTORQ_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_unconfigure() -> None:
    if OWN_CACHE is not None:
        OWN_CACHE.cleanup()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real models and texts."""
    if not DATA.is_dir():
        pytest.skip(f"needs real data: set MXTORQ_DATA ({DATA} is no folder)")
    return DATA


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Tab]":
    """A tab of Chromium, for tests of pages."""
    from browser import chromium, tab

    program = chromium()
    if program is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with tab(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved tiny model with tokenizer for each family, by name."""
    import tiny_models

    root = tmp_path_factory.mktemp("tiny")
    return {
        name: tiny_models.save(tiny_models.build(name), root / name) for name in tiny_models.CONFIGS
    }


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some thousand characters of text that the tiny tokenizer turns into one token each."""
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 120, encoding="utf-8")
    return path
