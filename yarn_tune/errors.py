"""The one exception a user is meant to see."""


class UserError(ValueError):
    """A mistake the user can mend: the message has the value, the place and the remedy. Exit code 2."""


class CheckFailed(RuntimeError):
    """A check of ours (fidelity of an export, for example) did not hold. Exit code 3."""
