"""Objects of a section of the configuration (`_target_: ...`), whose keys a user types."""

from collections.abc import Mapping
from typing import Any

import hydra
from hydra.errors import InstantiationException

from utils import one_line


def instantiated(section: Mapping[str, Any], *, key: str, **arguments: Any) -> Any:
    """The object that a section describes.

    Args:
        section: `_target_` and the arguments of its call.
        key: of the section, for messages.
        arguments: further ones, which go before those of the section.

    Raises:
        ValueError: the class does not take them, or is not there; names the section.
    """
    try:
        return hydra.utils.instantiate(section, **arguments)
    except InstantiationException as error:
        reason = one_line(error.__cause__ or error)
        name = section.get("_target_", "_target_ is missing")
        raise ValueError(f"{key} ({name}): {reason}") from error
