"""Every exception that mxtorq raises to its users.

    MxtorqError
    |-- UsageError          the arguments contradict each other or name nothing
    |-- ModelError          a model cannot be read, is not supported, or holds NaN or Inf
    |-- TextError           calibration or evaluation text is missing, empty or too short
    |-- FormatError         numbers or bytes that are not MXFP4
    |-- OutputError         the output folder exists or cannot be written
    |-- CheckpointError     a checkpoint is corrupt, truncated or of an unknown version
    |-- RankError           of several processes that work together, another one ended
    `-- VerificationError   what was written and what was computed differ

A message has four parts, in this order: what was asked, what was found, why that cannot work, and
what to do. They are separate arguments so that none is forgotten.
"""


class MxtorqError(Exception):
    """The root: catch this to catch everything that mxtorq raises on purpose.

    Args:
        asked: what the caller wanted.
        found: what is there instead (names, shapes, values).
        why: why the two cannot be reconciled.
        todo: what the reader can do now.
    """

    def __init__(self, *, asked: str, found: str, why: str, todo: str) -> None:
        self.asked, self.found, self.why, self.todo = asked, found, why, todo
        super().__init__(f"asked: {asked}\nfound: {found}\nwhy:   {why}\nto do: {todo}")


class UsageError(MxtorqError):
    """The arguments contradict each other or name something that does not exist."""


class ModelError(MxtorqError):
    """A model cannot be read, is of an unsupported family, or holds NaN or Inf."""


class TextError(MxtorqError):
    """Calibration or evaluation text is missing, empty or too short."""


class FormatError(MxtorqError):
    """Numbers or bytes that are not, or cannot become, MXFP4."""


class OutputError(MxtorqError):
    """The output folder exists already or cannot be written."""


class CheckpointError(MxtorqError):
    """A checkpoint is corrupt, truncated, or of a version that this release does not know."""


class RankError(MxtorqError):
    """One of several processes that work together cannot go on because another one ended."""


class VerificationError(MxtorqError):
    """A checkpoint read back from disk does not compute what the model in memory computed."""
