"""The sections of the configuration: the rules of a valid run, and what they ask for, typed."""

from configuration.ignored_keys import IGNORED_KEYS, ignored_key_warnings
from configuration.validation import validate

__all__ = ["IGNORED_KEYS", "ignored_key_warnings", "validate"]
