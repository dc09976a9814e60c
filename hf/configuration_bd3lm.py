"""What `config.json` of a published model says."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

GPT2_VOCAB_SIZE, GPT2_EOS = 50257, 50256


@strict
class BD3LMConfig(PreTrainedConfig):
    """Sizes and switches of a BD3-LM, MDLM, SEDD or AR model; the defaults are `model=small`.

    The fields down to `sampling_eps_max` are the original's. The others have defaults that suit the
    published models, whose files lack them. Losses and samples need the ids of special tokens; with
    GPT-2's vocabulary and a mask behind it they are known.

    Attributes:
        block_size: L.
        vocab_size: V, the mask token included.
        model_length: N, in tokens.
        cross_attn: block diffusion; the network is trained on [x_t ; x_0].
        adaln: the network is conditioned on the noise level.
        attn_backend: see `models/attention.py`.
        causal: autoregressive.
        hidden_dim, cond_dim, n_blocks, n_heads, dropout: of the network.
        time_conditioning: whether the network is told the noise level; otherwise it sees 0.
        var_min: the range of t was searched for, and is stored with the weights.
        sampling_eps_min, sampling_eps_max: that range as training began.
        parameterization: subs, sedd or ar. None: what follows from the switches, if anything does;
            without it there are logits alone.
        noise: the schedule, see `noise_schedule.py`.
        mask_index: id of the mask token.
        bos_token_id, eos_token_id: of the rows the model was trained on.
    """

    model_type = "bd3lm"
    attribute_map = {
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "n_blocks",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "model_length",
    }

    block_size: int = 1024
    vocab_size: int = 50258
    model_length: int = 1024
    cross_attn: bool = True
    adaln: bool = True
    attn_backend: str = "auto"
    causal: bool = False
    hidden_dim: int = 768
    cond_dim: int = 128
    n_blocks: int = 12
    n_heads: int = 12
    dropout: float | int = 0.1
    time_conditioning: bool = False
    var_min: bool = True
    sampling_eps_min: float | int = 1e-3
    sampling_eps_max: float | int = 1.0
    parameterization: str | None = None
    noise: str = "loglinear"
    mask_index: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any):
        """Fills in what depends on other fields."""
        if self.parameterization is None and self.causal:
            self.parameterization = "ar"
        elif self.parameterization is None and (self.cross_attn or not self.time_conditioning):
            self.parameterization = "subs"
        if self.vocab_size == GPT2_VOCAB_SIZE + 1:
            defaults = {"mask_index": GPT2_VOCAB_SIZE, "bos_token_id": GPT2_EOS,
                        "eos_token_id": GPT2_EOS}  # fmt: skip
            for name, index in defaults.items():
                if getattr(self, name) is None:
                    setattr(self, name, index)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, source: str, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; a file of the published MDLM models becomes one of this class.

        Raises:
            ValueError: if the file is of another type of model.
        """
        values, unused = super().get_config_dict(source, **kwargs)
        model_type = values.get("model_type", cls.model_type)
        if model_type == "mdlm":
            values = _from_mdlm(values)
        elif model_type != cls.model_type:
            raise ValueError(f"{source}: model_type={model_type}, allowed are bd3lm and mdlm")
        return values, unused


def _from_mdlm(values: dict[str, Any]) -> dict[str, Any]:
    """MDLM is block diffusion with one block, without the clean half that nothing then sees."""
    values = {**values, "model_type": BD3LMConfig.model_type}
    defaults = {"block_size": values["model_length"], "cross_attn": False, "var_min": False}
    return {**defaults, **values}
