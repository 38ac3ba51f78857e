"""Weights by their name, from the Hugging Face Hub; what was fetched once is kept there."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from aim_flax.errors import UsageError
from aim_flax.files import read_json

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


def fetch(name: str, data: ConfigDict | None = None) -> Path:
    """Returns the file of a repository's weights.

    Args:
      name: OWNER/REPOSITORY, whose model.safetensors is meant, or OWNER/REPOSITORY/FILE; a
        revision may follow the repository: OWNER/REPOSITORY@REVISION.
      data: the config's group, if the repository has a config.json as timm writes it: what that
        says of the input must be so.

    Raises:
      UsageError: it cannot be fetched, or is of another input.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise UsageError(
            f"there is no file {name}; if it is a name on the Hugging Face Hub: fetching it needs"
            " the extra hub, pip install 'aim_flax[hub]'"
        ) from None
    owner, repository, *rest = name.split("/")
    repository, _, revision = repository.partition("@")

    def file(within: str) -> Path:
        found = huggingface_hub.hf_hub_download(
            f"{owner}/{repository}", within, revision=revision or None
        )
        return Path(found)

    try:
        weights = file("/".join(rest) or _WEIGHTS)
        described = read_json(file(_CONFIG)) if data is not None else {}
    except UsageError:
        raise
    # There are many kinds: no such name, no network, no right to it.
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(
            f"there is no file {name}, and as a name it can't be fetched: {reason}"
        ) from None
    if data is not None:
        _check_input(name, described.get("pretrained_cfg") or {}, data)
    return weights


def _check_input(name: str, described: dict[str, Any], data: ConfigDict) -> None:
    """Raises UsageError where weights were trained with another mean or deviation."""
    wrong = {}
    for key, theirs in (("mean", "mean"), ("deviation", "std")):
        expected = described.get(theirs)
        # Theirs are of pixels from 0 to 1.
        found = [value * data.scale / 255 for value in data[key]]
        if expected and found != list(expected):
            wrong[key] = tuple(expected)
    if wrong:
        flags = " ".join(f'--config.data.{key}="{value}"' for key, value in wrong.items())
        raise UsageError(f"{name} is of an input with another {' and '.join(wrong)}: set {flags}")
