"""Classifiers in the interface of a causal language model, so that every stage and method runs on them as it is.

An example of n features and one of C classes is a text of two tokens. The first names the example; its embedding is the
example's features, a table that is not trained. The second is the class, and the next-token loss of the text is the
classifier's cross-entropy. The layers in between and the head are an MLP's.

    token ids    0 … C−1      the classes, and the logits
                 C … C+N−1    the examples, which are read and never predicted

Example: 3 classes and examples 0 and 1 of class 2 and 0 are the texts [3, 2] and [4, 0].
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class ClassifierConfig(PretrainedConfig):
    """Shape of a classifier.

    Attributes:
        classes: C.
        examples: N, all that are ever asked about: training and queries.
        inputs: n, features of an example.
        hidden_size: width of the hidden layers.
        num_hidden_layers: number of hidden layers, at least one.
    """

    model_type = "stride_ray_classifier"

    def __init__(
        self,
        classes: int = 2,
        examples: int = 1,
        inputs: int = 1,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        **others: Any,
    ) -> None:
        self.classes, self.examples, self.inputs = classes, examples, inputs
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.vocab_size, self.max_position_embeddings = classes + examples, 2
        super().__init__(**{"tie_word_embeddings": False, "pad_token_id": None, **others})


class FeatureTable(nn.Module):
    """The embedding: a row of features for each token id, zeros for classes; saved with the model, never trained."""

    def __init__(self, rows: int, inputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(rows, inputs))
        self.weight: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        """(…) ids to (…, n) features."""
        return self.weight[ids]


class HiddenLayer(nn.Module):
    """A linear map and a ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.map = nn.Linear(inputs, outputs)

    def forward(self, h: Tensor) -> Tensor:
        """(…, inputs) to (…, outputs)."""
        return torch.relu(self.map(h))


class Body(nn.Module):
    """The features and the hidden layers."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.features = FeatureTable(config.vocab_size, config.inputs)
        widths = [config.inputs, *[config.hidden_size] * config.num_hidden_layers]
        self.layers = nn.ModuleList(map(HiddenLayer, widths, widths[1:]))

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) ids to the last hidden layer, (B, T, D)."""
        h = self.features(input_ids)
        for layer in self.layers:
            h = layer(h)
        return h


class Classifier(PreTrainedModel):
    """An MLP that classifies, as a causal language model of texts [example, class]."""

    config_class = ClassifierConfig
    base_model_prefix = "model"

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.classes)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of features."""
        return self.model.features

    def get_output_embeddings(self) -> nn.Module:
        """The last linear map."""
        return self.lm_head

    def get_decoder(self) -> nn.Module:
        """All but the head."""
        return self.model

    def forward(self, input_ids: Tensor, **others: Any) -> CausalLMOutput:
        """(B, T) ids to the logits of the classes, (B, T, C)."""
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)


def auto_model() -> Any:
    """transformers.AutoModelForCausalLM, which from then on also loads classifiers from their folders."""
    AutoConfig.register(ClassifierConfig.model_type, ClassifierConfig, exist_ok=True)
    AutoModelForCausalLM.register(ClassifierConfig, Classifier, exist_ok=True)
    return AutoModelForCausalLM
