"""Opens feature extractors by their settings, and finds the settings in a units manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from most_ray.speech.units.features import EncoderSettings, Extractor, FeatureSettings, MfccSettings
from most_ray.speech.units.mfcc import MfccExtractor


def open_extractor(settings: FeatureSettings, device: str | None = None) -> Extractor:
    """The extractor with these settings.

    Args:
        device: torch device, for an extractor that uses one; None: a GPU if there is one.

    Raises:
        ConfigError, CheckpointError: the encoder does not exist, or does not have that layer.
    """
    if isinstance(settings, MfccSettings):
        return MfccExtractor(settings)
    import torch  # takes seconds to import, as does transformers, and MFCC does without

    from most_ray.speech.units.encoder import EncoderExtractor

    return EncoderExtractor(settings, device or ("cuda" if torch.cuda.is_available() else "cpu"))


def manifest_settings(manifest: Mapping[str, Any], source: str | None = None) -> FeatureSettings:
    """The settings of the features that a units manifest names.

    Args:
        source: folder or hub name of the encoder; None: the one that the manifest names.

    Raises:
        KeyError, TypeError, ValueError: the manifest does not describe its features.
    """
    identity = manifest["identity"]
    if identity["features"] == "mfcc":
        return MfccSettings(**identity["settings"])
    return EncoderSettings(identity["features"], source or manifest["encoder"], int(identity["settings"]["layer"]))
