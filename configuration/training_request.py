"""What the sections of a training ask for."""


def lightning_precision(precision: str | int) -> str:
    """Lightning's name of a precision; the original's configs say `bf16` for mixed bf16."""
    names = {"bf16": "bf16-mixed", "16": "16-mixed", "32": "32-true", "64": "64-true"}
    return names.get(str(precision), str(precision))
