"""One file per layer family. Importing the package fills the registry."""

from keras_adafisher.wrappers.base import LayerWrapper
from keras_adafisher.wrappers.base import wrapper_of
from keras_adafisher.wrappers.block import Block
from keras_adafisher.wrappers.block import GradientBlock
from keras_adafisher.wrappers.conv import ConvBlock
from keras_adafisher.wrappers.conv_transpose import ConvTransposeBlock
from keras_adafisher.wrappers.dense import DenseBlock
from keras_adafisher.wrappers.depthwise import DepthwiseConvBlock
from keras_adafisher.wrappers.einsum import EinsumBlock
from keras_adafisher.wrappers.embedding import EmbeddingBlock
from keras_adafisher.wrappers.embedding import ReverseEmbeddingBlock
from keras_adafisher.wrappers.experts import ExpertsBlock
from keras_adafisher.wrappers.keras_hub import PositionEmbeddingWrapper
from keras_adafisher.wrappers.layer_scale import LayerScaleWrapper
from keras_adafisher.wrappers.matrix_view import MatrixView
from keras_adafisher.wrappers.normalization import ScaleBlock
from keras_adafisher.wrappers.prelu import SlopeBlock
from keras_adafisher.wrappers.recurrent import RecurrentCellWrapper
from keras_adafisher.wrappers.registry import find_wrapper
from keras_adafisher.wrappers.registry import register_wrapper
from keras_adafisher.wrappers.registry import warn_of_override

__all__ = [
    "Block",
    "ConvBlock",
    "ConvTransposeBlock",
    "DenseBlock",
    "DepthwiseConvBlock",
    "EinsumBlock",
    "EmbeddingBlock",
    "ExpertsBlock",
    "GradientBlock",
    "LayerScaleWrapper",
    "LayerWrapper",
    "MatrixView",
    "PositionEmbeddingWrapper",
    "RecurrentCellWrapper",
    "ReverseEmbeddingBlock",
    "ScaleBlock",
    "SlopeBlock",
    "find_wrapper",
    "register_wrapper",
    "warn_of_override",
    "wrapper_of",
]
