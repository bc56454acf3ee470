"""``python -m mxtorq`` is the ``mxtorq`` command."""

from mxtorq.cli import main

main()
