"""Errors that say who acts. A bad message becomes a dead letter and is no exception at all; what is left is for people."""


class MillraceError(Exception):
    """Something a person must mend. The message says what came, what was expected and how to mend it."""


class SettingsError(MillraceError):
    """The settings are wrong: the user acts. Exit status 2."""


class DeploymentError(MillraceError):
    """Broker, topics, files or models are not what the settings say: the operator acts. Exit status 1."""
