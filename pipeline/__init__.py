"""From a pretrained language model to an aligned one, from one YAML file: a thin layer over Hugging Face TRL."""

__version__ = "0.1.0"

from pipeline.system import quiet as quiet  # first of all: libraries read its settings when they are imported
