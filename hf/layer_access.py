"""The layers of the Hugging Face model that transformers and PEFT ask for and exchange."""

import functools
from collections.abc import Callable

from torch import nn
from torch.utils.checkpoint import checkpoint

from .embeddings import as_embedding_layer, grow_vocabulary


class LayerAccess:
    """Embeddings, output layer and recomputation of a `BD3LM`, by transformers' names."""

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.vocab_embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.vocab_embed = as_embedding_layer(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.output_layer.linear

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.backbone.output_layer.linear = new_embeddings

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """More ids, see `grow_vocabulary`: all tokens and the mask keep theirs.

        Args:
            new_num_tokens: V, the mask counted; None: as now.
            pad_to_multiple_of: round it up.
            mean_resizing: new rows are the mean of the old ones, in any case.

        Raises:
            ValueError: if it is less than now.
        """
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        multiple = pad_to_multiple_of or 1
        if new_num_tokens is not None or pad_to_multiple_of is not None:
            grow_vocabulary(self, -(-size // multiple) * multiple)
        return self.get_input_embeddings()

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Keep of a layer its input alone; transformers calls this for all of its own names."""
        func = gradient_checkpointing_func
        if enable and getattr(func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "gradient checkpointing with use_reentrant=True: allowed is use_reentrant=False"
            )
        for layer, block in enumerate(self.backbone.blocks):
            forward = vars(block).get("forward")
            own = getattr(forward, "args", ())[:1]  # of a partial made here
            if own and getattr(own[0], "__self__", None) is block:
                del block.forward
            if enable and layer % every_n_layers == 0:
                block.forward = functools.partial(func, block.forward)
