"""The exceptions a user is meant to see."""


class UserError(ValueError):
    """A mistake the user can mend: the message has the value, the place and the remedy. Exit code 2."""


class CheckFailed(RuntimeError):
    """A check of ours (fidelity of an export, for example) did not hold. Exit code 3."""


class Interrupted(RuntimeError):
    """A signal asked for a stop, and everything done so far is saved. Exit code 128 + the signal's number."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal
