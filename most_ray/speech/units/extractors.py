"""Feature extractors by their settings."""

from __future__ import annotations

from most_ray.speech.units.features import Extractor, FeatureSettings, MfccSettings
from most_ray.speech.units.mfcc import MfccExtractor


def open_extractor(settings: FeatureSettings, device: str | None = None) -> Extractor:
    """What makes such features, on a torch device where it has use for one (None: the best there is).

    Raises:
        ConfigError, CheckpointError: no such encoder, or no such layer in it.
    """
    if isinstance(settings, MfccSettings):
        return MfccExtractor(settings)
    import torch  # takes seconds to import, as does transformers, and MFCC does without

    from most_ray.speech.units.encoder import EncoderExtractor

    return EncoderExtractor(settings, device or ("cuda" if torch.cuda.is_available() else "cpu"))
