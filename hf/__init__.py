"""The model as a class of Hugging Face transformers."""

from .configuration_bd3lm import BD3LMConfig
from .modeling_bd3lm import BD3LM

__all__ = ["BD3LM", "BD3LMConfig"]
