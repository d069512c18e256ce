"""Exceptions whose messages are written for users."""


class UserError(ValueError):
    """An error that the user can correct: the message has the value, the place and the remedy. Exit code 2."""


class CheckFailed(RuntimeError):
    """An internal check failed, for example the fidelity of an export. Exit code 3."""


class Interrupted(RuntimeError):
    """A signal stopped the run after its state was saved. Exit code 128 + the signal's number."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal
