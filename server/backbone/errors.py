"""Why a model cannot be the backbone.

BackboneError
├── UnsupportedBackbone     its family computes something that paged batches cannot reproduce, or hides its attention
└── BackboneNotFound        no such folder or name, or no safetensors in it
"""


class BackboneError(Exception):
    """The model cannot be served."""


class UnsupportedBackbone(BackboneError):
    """The family ignores the attention interface, or differs from itself in a paged batch; the reason is the text."""


class BackboneNotFound(BackboneError):
    """There is no such model here."""
