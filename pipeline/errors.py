"""Errors that say who acts. A bad message becomes a dead letter and is no exception at all; what is left is for people."""


class MillraceError(Exception):
    """Something a person must mend. The message says what came, what was expected and how to mend it."""


class SettingsError(MillraceError):
    """The settings are wrong: the user acts. Exit status 2."""


class DeploymentError(MillraceError):
    """Broker, topics, files or models are not what the settings say: the operator acts. Exit status 1."""


class BrokerUnavailable(DeploymentError):
    """No broker answered in time. A worker that is under way waits and tries again; whoever is about to start gives up."""
