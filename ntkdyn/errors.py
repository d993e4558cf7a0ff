"""Every error that ntkdyn raises on purpose.

Each class also inherits the fitting built-in, so ``except ValueError`` and ``except NtkdynError`` both work.
Messages are one line: what, where, found, expected, remedy. ``usage`` marks what the caller can mend by calling
differently; the command line turns it into exit code 2, everything else into 1.
"""


class NtkdynError(Exception):
    """Base of all errors raised by ntkdyn."""

    usage = False


class ShapeError(NtkdynError, ValueError):
    """An array has another shape than the formula needs."""


class UndefinedMeasure(NtkdynError, ValueError):
    """The measure has no value for these arrays, e.g. the angle to a zero kernel."""


class UnsupportedLayer(NtkdynError, NotImplementedError):
    """A layer cannot be treated exactly; the message names it by its dotted name."""


class ConversionError(NtkdynError, ValueError):
    """An activation could not be turned into a Gate; the message names its call site."""


class TraceError(NtkdynError, ValueError):
    """The graph of a network could not be traced, or holds a node without a path-length rule."""


class UnknownName(NtkdynError, LookupError):
    """A probe, experiment, study, set, field or parameter that does not exist."""

    usage = True


class ConfigurationError(NtkdynError, ValueError):
    """A setting that is unknown, of the wrong type, or impossible together with the others."""

    usage = True


class MissingDevice(ConfigurationError):
    """A device for training that this machine does not have."""


class ProbeError(NtkdynError, RuntimeError):
    """A probe raised, or returned something else than it declared."""


class NondeterministicForward(NtkdynError, ValueError):
    """The forward pass is random, or one sample's output depends on the other samples."""


class RecordingExists(NtkdynError, FileExistsError):
    """The output folder already holds something; nothing in it was touched."""

    usage = True


class LockedRecording(RecordingExists):
    """Another process is writing into the folder, or was and cannot be seen from here; nothing in it was touched."""


class MissingData(NtkdynError, FileNotFoundError):
    """A data set, or a file of it, is not where it was looked for; the message says what to put where."""

    usage = True


class DamagedData(NtkdynError, OSError):
    """A file of a data set is truncated, too large, of another format, or not the one that its checksum names."""


class StorageError(NtkdynError, OSError):
    """Bytes could not be brought to the disk, or read back from it."""


class MissingRecording(NtkdynError, FileNotFoundError):
    """There is nothing at the path of a recording."""

    usage = True


class DamagedRecording(NtkdynError, OSError):
    """A file is not a recording of ntkdyn, or its content does not match its checksums."""


class ReplacedFile(DamagedRecording):
    """Another file has taken the place of one that was checked."""


class EditedManifest(DamagedRecording):
    """run.json or sweep.json can be read, but is not what ntkdyn wrote there: edited, moved, or a byte has flipped."""


class NewerRecording(NtkdynError, ValueError):
    """A later version of ntkdyn wrote the recording; nothing in it was touched."""


class UntrustedFile(NtkdynError, PermissionError):
    """A file asks for something that a recording never needs (external link, huge array, foreign filter)."""


class DivergedTraining(NtkdynError, ArithmeticError):
    """The training loss is not finite any more."""


class ProcessFailure(NtkdynError, RuntimeError):
    """Another process of a distributed computation failed, ended or does not answer."""


class MissingPackage(NtkdynError, ImportError):
    """An optional package cannot be imported; the message holds the command that installs it."""
