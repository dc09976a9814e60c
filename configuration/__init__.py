"""The rules of a valid run, and the keys that do nothing."""

from configuration.ignored_keys import IGNORED_KEYS, ignored_key_warnings
from configuration.validation import validate

__all__ = ["IGNORED_KEYS", "ignored_key_warnings", "validate"]
