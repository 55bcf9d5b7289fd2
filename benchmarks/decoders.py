"""The decoders that benchmarks measure, by the number of their layers and their width."""

from xelm.models.config import ModelConfig


def decoder(shape: str, vocabulary: int, max_length: int = 2048) -> ModelConfig:
    """The shape of a Llama with heads of 64, each with keys of its own. shape: layers x width, such
    as 8x512."""
    layers, width = map(int, shape.split("x"))
    return ModelConfig(
        vocabulary_size=vocabulary,
        width=width,
        feedforward_width=int(8 * width / 3 / 64) * 64,
        layer_count=layers,
        head_count=width // 64,
        key_head_count=width // 64,
        head_size=64,
        max_length=max_length,
    )
