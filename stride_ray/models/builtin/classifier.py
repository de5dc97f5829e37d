"""Classifiers in the interface of a causal language model, so that every stage and method runs on them as it is.

An example of P patches with n features each, and one of C classes, is a text of P + 1 tokens. The first P name the
example's patches; their embeddings are the patches' features, a table that is not trained. The last is the class, and
the next-token loss of the text is the classifier's cross-entropy.

    token ids    0 … C−1         the classes, and the logits
                 C … C+N·P−1     the patches of example 0, then of example 1, …; read and never predicted

Layers are convolutions over the grid of patches, and the mean of the last one's outputs is read by the head. With one
patch, the whole example, that is an MLP.

Example: 3 classes and examples 0 and 1 of class 2 and 0 are the texts [3, 2] and [4, 0] with one patch each, and
[3, 4, 2] and [5, 6, 0] with two.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class ClassifierConfig(PretrainedConfig):
    """Shape of a classifier.

    Attributes:
        classes: C.
        examples: N, all that are ever asked about: training and queries.
        inputs: n, features of a patch.
        grid: rows and columns of an example's P patches, in the order of its tokens.
        hidden_size: width of the hidden layers, channels of a convolution.
        num_hidden_layers: number of hidden layers, at least one.
    """

    model_type = "stride_ray_classifier"

    def __init__(
        self,
        classes: int = 2,
        examples: int = 1,
        inputs: int = 1,
        grid: Sequence[int] = (1, 1),
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        **others: Any,
    ) -> None:
        self.classes, self.examples, self.inputs, self.grid = classes, examples, inputs, list(grid)
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.vocab_size, self.max_position_embeddings = classes + examples * self.patches, self.patches + 1
        super().__init__(**{"tie_word_embeddings": False, "pad_token_id": None, **others})

    @property
    def patches(self) -> int:
        """P."""
        return self.grid[0] * self.grid[1]


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
    """A 3 × 3 convolution over the grid of patches (a linear map if there is one patch) and a ReLU.

    The convolution is a linear map of each patch with its neighbours, so that its weight's gradient is a sum of outer
    products over patches, as a language model's is over tokens.
    """

    def __init__(self, inputs: int, outputs: int, grid: Sequence[int]) -> None:
        super().__init__()
        self.grid, self.kernel = tuple(grid), 1 if max(grid) == 1 else 3
        self.map = nn.Linear(inputs * self.kernel**2, outputs)

    def forward(self, h: Tensor) -> Tensor:
        """(B, T, inputs) to (B, T, outputs)."""
        return torch.relu(self.map(h if self.kernel == 1 else self.neighbourhoods(h)))

    def neighbourhoods(self, h: Tensor) -> Tensor:
        """(B, T, n) to (B, T, 9 n): each patch's neighbours, zeros beyond the grid and for the class."""
        T, P = h.shape[1], self.grid[0] * self.grid[1]
        patches = pad(h[:, :P], (0, 0, 0, max(0, P - T)))
        found = unfold(patches.transpose(1, 2).unflatten(2, self.grid), self.kernel, padding=1)
        return pad(found.transpose(1, 2)[:, :T], (0, 0, 0, max(0, T - P)))


class Body(nn.Module):
    """The features, the hidden layers, and the mean over the patches."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.features = FeatureTable(config.vocab_size, config.inputs)
        widths = [config.inputs, *[config.hidden_size] * config.num_hidden_layers]
        self.layers = nn.ModuleList(HiddenLayer(*each, config.grid) for each in pairwise(widths))
        self.patches = config.patches

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) ids to (B, T, D): the last hidden layer's mean over the patches at the last of them, else zeros.

        Zeros keep the model causal: no position depends on a later token.
        """
        h = self.features(input_ids)
        for layer in self.layers:
            h = layer(h)
        T, P = h.shape[1], self.patches
        return pad(h[:, :P].mean(1, keepdim=True), (0, 0, P - 1, T - P)) if T >= P else torch.zeros_like(h)


class Classifier(PreTrainedModel):
    """A convolutional network or an MLP that classifies, as a causal language model of texts [patches…, class]."""

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
