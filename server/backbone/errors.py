"""Why a model cannot be the backbone.

BackboneError
├── UnsupportedBackbone     its family computes something that paged batches cannot reproduce, or hides its attention
├── BackboneNotFound        no such folder or name, or no safetensors in it
├── BackboneDamaged         its files cannot be read, or are not those of the model that its config describes
└── BackboneTooLarge        the device has no room for its parameters
"""


class BackboneError(Exception):
    """The model cannot be served."""


class UnsupportedBackbone(BackboneError):
    """The family ignores the attention interface, or differs from itself in a paged batch; the reason is the text."""


class BackboneNotFound(BackboneError):
    """There is no such model here."""


class BackboneDamaged(BackboneError):
    """Its files cannot be read, or are not those of the model that its config describes."""


class BackboneTooLarge(BackboneError):
    """The device has no room for its parameters."""
